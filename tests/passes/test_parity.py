"""Lowered models equal the single-process ones: loss and every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from omnicompile.plan import BlockPlan, Layout, Mesh, Sharding

from .models import (
    block_plans,
    dense_model,
    image_batch,
    image_batches,
    latent_mixture_model,
    mixture_model,
    stacked_mixture_vl_model,
    text_batch,
    vision_language_model,
    windowed_model,
)
from .omni_models import (
    fixed_image_batch,
    fixed_image_model,
    omni_batch,
    omni_mixture_model,
    omni_model,
)
from .parity import Parity, run_parity
from .plain_models import plain_model, speech_batch, speech_model

TOLERANCE = 1e-5


def _check(result: Parity, tolerance: float = TOLERANCE) -> None:
    name, worst = result.worst
    assert result.loss_error < tolerance
    assert worst < tolerance, f"{name}: {worst:.1e}"


def _text(model: nn.Module, mesh: Mesh, sharding: Sharding = Sharding.FSDP, rows: int = 1) -> Parity:
    batches = [text_batch(seed, rows=rows) for seed in range(mesh.data_ranks)]
    result = run_parity(model, batches, mesh, block_plans(mesh, sharding))
    _check(result)
    return result


def _vision(model: nn.Module, mesh: Mesh, layout: Layout, sharding: Sharding = Sharding.FSDP) -> Parity:
    result = run_parity(model, image_batches(mesh.data_ranks), mesh, block_plans(mesh, sharding, layout))
    _check(result)
    return result


def test_experts_sequence_and_data_parallel_together() -> None:
    result = _text(mixture_model(), Mesh(dp_shard=2, sp=2, ep=2))
    text = result.program.gm.code
    assert text.count("expert_ops_dispatch(") == 2 and text.count("collectives_all_to_all(") == 8


def test_sequence_parallel_vision_and_text() -> None:
    _vision(vision_language_model(), Mesh(dp_shard=2, sp=2), Layout.SEQUENCE)


def test_replicated_vision_feeds_a_cut_sequence() -> None:
    result = _vision(vision_language_model(), Mesh(sp=2), Layout.REPLICATED)
    assert "all_gather(" not in result.program.gm.code


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [Mesh(sp=2), Mesh(dp_shard=2), Mesh(dp_shard=2, ep=2), Mesh(sp=4), Mesh(dp_shard=2, sp=2, ep=4), Mesh(sp=4, ep=4),
     Mesh(dp_replicate=2, dp_shard=2, sp=2, ep=2)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("model", [mixture_model, latent_mixture_model, dense_model])
def test_text_models(model: Callable[[], nn.Module], mesh: Mesh) -> None:
    _text(model(), mesh)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", list(Sharding))
def test_shardings(sharding: Sharding) -> None:
    _text(mixture_model(), Mesh(dp_replicate=2, dp_shard=2, sp=2, ep=2), sharding)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout.REPLICATED, Layout.SEQUENCE])
@pytest.mark.parametrize("mesh", [Mesh(sp=2), Mesh(sp=4), Mesh(dp_shard=2, sp=2)], ids=str)
@pytest.mark.parametrize("model", [vision_language_model, windowed_model, stacked_mixture_vl_model])
def test_vision_models(model: Callable[[], nn.Module], mesh: Mesh, layout: Layout) -> None:
    _vision(model(), mesh, layout)


@pytest.mark.slow
def test_key_heads_fewer_than_ranks() -> None:
    _text(dense_model(kv_heads=1), Mesh(sp=4))


@pytest.mark.slow
def test_tied_weights_and_several_rows() -> None:
    _text(dense_model(tied=True), Mesh(dp_shard=2, sp=2), rows=2)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [Mesh(dp_shard=2), Mesh(sp=2), Mesh(dp_shard=2, sp=2, ep=2)], ids=str)
def test_auxiliary_loss_of_global_means(mesh: Mesh) -> None:
    batches = [text_batch(seed) for seed in range(mesh.data_ranks)]
    joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    _check(run_parity(mixture_model(aux=True), batches, mesh, block_plans(mesh), joined))


@pytest.mark.slow
@pytest.mark.parametrize("model", [vision_language_model, windowed_model, stacked_mixture_vl_model])
def test_whole_images_on_each_rank(model: Callable[[], nn.Module]) -> None:
    mesh = Mesh(dp_shard=2, sp=2)
    grids = [[(1, 4, 4), (1, 4, 4), (1, 8, 4)], [(1, 8, 4), (1, 4, 8)]]
    batches = [image_batch(seed, grids[seed]) for seed in range(2)]
    result = run_parity(model(), batches, mesh, block_plans(mesh, vision=Layout.IMAGES))
    _check(result)
    assert result.program.aligned and set(result.program.aligned.values()) == {32}


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout.REPLICATED, Layout.SEQUENCE])
@pytest.mark.parametrize("model", [omni_model, omni_mixture_model])
def test_omni_models(model: Callable[[], nn.Module], layout: Layout) -> None:
    mixture = model is omni_mixture_model
    mesh = Mesh(dp_shard=2, sp=2, ep=2 if mixture else 1)
    blocks = block_plans(mesh, vision=layout)
    blocks["audio_tower"] = BlockPlan(layout=layout, sp=2)
    _check(run_parity(model(), [omni_batch(seed, mixture) for seed in range(2)], mesh, blocks))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout.REPLICATED, Layout.SEQUENCE, Layout.IMAGES])
def test_images_of_one_size(layout: Layout) -> None:
    mesh = Mesh(dp_shard=2, sp=2)
    blocks = block_plans(mesh, vision=layout, vision_name="vision_model")
    _check(run_parity(fixed_image_model(), [fixed_image_batch(seed) for seed in range(2)], mesh, blocks))


@pytest.mark.slow
def test_layouts_differ_from_block_to_block() -> None:
    mesh = Mesh(sp=2)
    blocks = block_plans(mesh, Sharding.HSDP, Layout.SEQUENCE)
    blocks["audio_tower"] = BlockPlan(sharding=Sharding.REPLICATE, layout=Layout.REPLICATED)
    _check(run_parity(omni_model(), [omni_batch(0, False)], mesh, blocks))


@pytest.mark.slow
def test_hand_written_model_shifts_targets_not_logits() -> None:
    mesh = Mesh(dp_shard=2, sp=2)
    result = run_parity(plain_model(), [text_batch(seed, rows=2) for seed in range(2)], mesh, block_plans(mesh))
    _check(result)
    assert "all_gather(" not in result.program.gm.code


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout.REPLICATED, Layout.SEQUENCE])
def test_cross_attention(layout: Layout) -> None:
    mesh = Mesh(dp_shard=2, sp=2)
    batches = [_double(speech_batch(seed)) for seed in range(2)]
    blocks = block_plans(mesh, vision=layout, vision_name="encoder")
    _check(run_parity(speech_model().double(), batches, mesh, blocks, shift=0), 1e-9)


def _double(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
