"""What the planner sees of an omni model, which says itself what its forward takes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import sympy
import torch
from omni_models import MODELS, tiny

import omnicompile
from omnicompile.capture.inputs import InputRequest, input_constraints, make_inputs
from omnicompile.capture.inputs.types import StatesInputs, TextTooShort
from omnicompile.capture.regions import modality_of_input
from omnicompile.program import OpKind, Phase, Sym
from omnicompile.workload import Workload

sys.path.insert(0, str(Path(__file__).parents[1] / "capture"))
from captures import Captured, capture

BLOCKS = {name: {"vision", "output_image", "text"} | ({"audio"} if "omni" in name else set()) for name in MODELS}
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def janus() -> Captured:
    return capture(tiny("janus_tiny"), Workload())


def test_arguments_carry_modalities_of_their_own() -> None:
    names = ("image_values", "audio_values", "depth_values", "output_image_values", "output_image_ids", "labels")
    assert [modality_of_input(n) for n in names] == ["vision", "audio", "depth", "output_image", "text", "text"]


@pytest.mark.parametrize("name", MODELS)
def test_the_model_states_its_own_inputs(name: str) -> None:
    model = tiny(name)
    assert isinstance(model, StatesInputs)
    limits = input_constraints(model)
    grid = (4, 8) if limits.images.packed else None
    frames = limits.audio.frames if limits.audio else None
    found = make_inputs(model, InputRequest(200, 2, grid, frames, 1 if limits.audio else 0))
    per_image = 16 + 2 + (8 if limits.images.packed else 16) + 2
    assert found.tokens_per_image == per_image
    kwargs = {n: v if isinstance(v, torch.Tensor) else torch.randn(v.shape) for n, v in found.kwargs.items()}
    assert kwargs["input_ids"].shape == (1, 200) and model(**kwargs).loss.isfinite()
    with pytest.raises(TextTooShort) as short:
        make_inputs(model, InputRequest(40, 2, grid, frames, 1 if limits.audio else 0))
    kwargs = make_inputs(model, InputRequest(short.value.needed, 2, grid, frames, 1 if limits.audio else 0)).kwargs
    assert kwargs["input_ids"].shape == (1, short.value.needed)


def test_work_of_every_block_in_closed_form(janus: Captured) -> None:
    model = tiny("janus_tiny")
    assert {b.name for b in janus.program.blocks} == BLOCKS["janus_tiny"]
    found = {block: sympy.Integer(0) for block in BLOCKS["janus_tiny"]}
    for segment in janus.program.segments:
        for op in segment.phase_ops(Phase.FORWARD):
            if op.kind is OpKind.GEMM:
                found[segment.block] += op.flops * segment.count
    layers = sum(p.numel() for n, p in model.foundation.named_parameters() if ".layers." in n and p.dim() == 2)
    head, codes = model.foundation.lm_head.weight.numel(), 16 * Sym.I
    drawn = sum(p.numel() for p in model.decoder("image").head.parameters() if p.dim() == 2)
    assert sympy.expand(found["text"] - 2 * Sym.S * (layers + head) - 2 * codes * drawn) == 0
    seen = sum(p.numel() for n, p in model.encoder("image").named_parameters() if p.dim() == 2 and "position" not in n)
    patches = model.encoder("image").tower.embeddings.patch_embedding.weight.numel()
    assert sympy.expand(found["vision"] - 2 * 16 * Sym.I * (seen + patches)) == 0
    assert found["output_image"].free_symbols == {Sym.I}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_other_generic_sizes_read_as_the_same_expressions(name: str) -> None:
    first, second = (capture(tiny(name), Workload(), variant).program for variant in (0, 1))
    assert [(s.name, s.count) for s in first.segments] == [(s.name, s.count) for s in second.segments]
    for a, b in zip(first.segments, second.segments):
        if a.role == "layer":
            assert [op.flops for op in a.ops] == [op.flops for op in b.ops], a.name


@pytest.mark.slow
@pytest.mark.parametrize(("name", "billions"), [("omni_janus", 7.41), ("omni_llama", 9.78), ("omni_qwen3_moe", 32.2)])
def test_published_sizes_are_planned_for_128_gpus(name: str, billions: float) -> None:
    plan = omnicompile.plan(str(EXAMPLES / f"{name}.py"), cluster=omnicompile.Cluster(gpus=128))
    assert plan.mesh.world == 128 and plan.prediction is not None
    with torch.device("meta"):
        model = omnicompile.capture.source.load_model_source(str(EXAMPLES / f"{name}.py")).build()
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01 * billions)
    assert set(plan.blocks) == BLOCKS[{"omni_janus": "janus_tiny"}.get(name, "llama_omni_tiny")]
