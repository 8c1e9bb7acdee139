"""The capture of published models at their published sizes, against parameter counts and an independent FLOP count.

Two models run in the fast tier, all of them with `-m slow`. docs/models.md has the table that comes out.
"""

from __future__ import annotations

from functools import cache

import pytest
import sympy

from omnicompile.capture.api import capture_program
from omnicompile.capture.source import load_model_source
from omnicompile.program import Op, OpKind, Phase, Program, Recompute, Segment, Sym
from omnicompile.workload import Workload

from .captures import Captured, capture, evaluate, flops
from .closed_form import Count, Parts, Sample, count
from .zoo import EXAMPLES, ZOO, Entry

FAST = ("Llama-3.1-8B", "Qwen2-VL-7B")
CUSTOM = "examples/custom_model.py"
TOLERANCE = 5e-3
# Where tracing every layer takes no more than about a minute.
FULL_DEPTH = (
    "Llama-3.1-8B",
    "Qwen2-VL-7B",
    "Qwen2.5-VL-7B",
    "Qwen3-VL-8B",
    "Janus-Pro-7B",
    "Whisper-large-v3",
    "SigLIP-so400m",
)
HUGGING_FACE = [name for name in ZOO if name != CUSTOM]


def names(of: list[str] = HUGGING_FACE, fast: tuple[str, ...] = FAST) -> list[object]:
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in of]


@cache
def captured(name: str) -> Captured:
    """Each model is captured once for all tests."""
    return capture(ZOO[name].build(), Workload())


def workloads(found: Captured) -> list[Workload]:
    """The default, and another sequence length, image size (no multiple of an attention window) and clip length."""
    seconds = None if found.limits.audio is None else 20.0
    return [Workload(), Workload(seq_len=5000, image_size=(700, 476), audio_seconds=seconds)]


def closed_form(entry: Entry, program: Program, grid: tuple[int, int]) -> Count:
    s = program.sample
    return count(entry.family, entry.parts, Sample(s.seq_len, s.images, grid, s.clips, s.frames_per_clip))


@pytest.mark.parametrize("name", names(list(ZOO), (*FAST, "SigLIP-so400m", "Whisper-large-v3", CUSTOM)))
def test_builds_at_the_published_size(name: str) -> None:
    assert sum(p.numel() for p in ZOO[name].build().parameters()) == ZOO[name].params


@pytest.mark.parametrize("name", names())
def test_parameters_are_all_in_the_program_once(name: str) -> None:
    assert captured(name).program.param_count == ZOO[name].params


@pytest.mark.parametrize("name", names())
def test_flops_equal_the_closed_form(name: str) -> None:
    found = captured(name)
    for workload in workloads(found):
        program = found.at(workload)
        expected = closed_form(ZOO[name], program, found.grid(workload))
        assert flops(program, Phase.FORWARD) == pytest.approx(expected.forward, rel=TOLERANCE)
        assert flops(program, Phase.BACKWARD) == pytest.approx(expected.backward, rel=TOLERANCE)


@pytest.mark.slow
def test_hand_written_model_equals_the_closed_form() -> None:
    source = load_model_source(str(EXAMPLES / "custom_model.py"))
    for seq_len in (8192, 4096):
        program = capture_program(source, Workload(seq_len=seq_len), cache=False)
        assert program.param_count == ZOO[CUSTOM].params
        expected = closed_form(ZOO[CUSTOM], program, (24, 24))
        assert flops(program, Phase.FORWARD) == pytest.approx(expected.forward, rel=TOLERANCE)
        assert flops(program, Phase.BACKWARD) == pytest.approx(expected.backward, rel=TOLERANCE)


def _prices(segment: Segment) -> list[tuple[object, ...]]:
    """All expressions of a segment that are zero in no workload."""
    ops = [(op.target, op.flops, op.activation_bytes, op.param_bytes, op.gemm, op.attention) for op in segment.ops]
    saved = [(policy, kept.nbytes, kept.nbytes_frozen) for policy, kept in segment.saved.items()]
    return [*ops, *saved, (segment.input_bytes, segment.output_bytes, segment.logits)]


def _leading(expr: object) -> object:
    """The terms of an expression that grow with the workload."""
    if isinstance(expr, sympy.Expr):
        return sum((t for t in sympy.Add.make_args(sympy.expand(expr)) if t.free_symbols), sympy.Integer(0))
    return expr


@pytest.mark.parametrize("name", names(fast=("Llama-3.1-8B",)))
def test_other_generic_sizes_read_as_the_same_expressions(name: str) -> None:
    """A dimension that were a multiple of a generic size by chance would read differently with the other primes."""
    first = captured(name).program
    second = capture(ZOO[name].build(), Workload(), variant=1).program
    assert [s.name for s in first.segments] == [s.name for s in second.segments]
    assert first.runs == second.runs
    for a, b in zip(first.segments, second.segments):
        if a.role in ("layer", "head"):
            for left, right in zip(_prices(a), _prices(b), strict=True):
                assert [_leading(x) for x in left] == [_leading(x) for x in right], a.name


_SYMBOLS = {
    "vision": {Sym.N, Sym.N2, Sym.I},
    "audio": {Sym.A, Sym.A2, Sym.C},
    "text": {Sym.S, Sym.S2},
}


def _is_work(op: Op) -> bool:
    return op.kind in (OpKind.GEMM, OpKind.ATTENTION, OpKind.GROUPED_GEMM)


@pytest.mark.parametrize("name", names())
def test_work_grows_with_the_symbols_of_its_block(name: str) -> None:
    found = captured(name)
    allowed = dict(_SYMBOLS)
    if found.limits.rows.value != "samples":
        allowed["text"] = {Sym.S, Sym.S2, Sym.I, Sym.C, Sym.A, Sym.N}  # one text per image or clip
    for segment in found.program.segments:
        for op in segment.ops:
            if _is_work(op):
                assert op.flops.free_symbols, (segment.name, op.name)
                assert op.flops.free_symbols <= allowed[segment.block], (segment.name, op.name, op.flops)
        if segment.role == "layer":
            for op in segment.ops:
                # Only a copy of a parameter (a router's weight in float32) has one size.
                assert op.activation_bytes.free_symbols or op.param_bytes, (segment.name, op.name)
                assert op.activation_bytes.free_symbols <= allowed[segment.block], (segment.name, op.name)


@pytest.mark.parametrize("name", names())
def test_every_recompute_policy_keeps_less_than_the_one_before(name: str) -> None:
    program = captured(name).program
    for segment in program.segments:
        if not segment.saved:
            continue
        kept = [evaluate(program, segment.saved[p].nbytes) for p in Recompute]
        frozen = [evaluate(program, segment.saved[p].nbytes_frozen) for p in Recompute]
        assert kept == sorted(kept, reverse=True), segment.name
        assert all(f <= k for f, k in zip(frozen, kept)), segment.name
        if segment.role == "layer":
            assert 0 < kept[-1] <= evaluate(program, segment.input_bytes), segment.name
            assert kept[1] > kept[-1], segment.name


def _agree(name: str, short: Captured, whole: Captured, parts: Parts) -> None:
    """Two captures of one model have equal parameters and FLOPs, which are those of the closed form."""
    assert short.program.param_count == whole.program.param_count
    for workload in workloads(short):
        a, b = short.at(workload), whole.at(workload)
        s = a.sample
        sample = Sample(s.seq_len, s.images, short.grid(workload), s.clips, s.frames_per_clip)
        expected = count(ZOO[name].family, parts, sample)
        for phase, closed in ((Phase.FORWARD, expected.forward), (Phase.BACKWARD, expected.backward)):
            assert flops(a, phase) == pytest.approx(flops(b, phase), rel=1e-9)
            assert flops(a, phase) == pytest.approx(closed, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_repeated_layers_agree_with_every_layer_traced(name: str) -> None:
    """With all widths as published and six layers in each stack."""
    entry = ZOO[name]
    short, whole = (capture(entry.build_small(), Workload(), repeat=repeat) for repeat in (True, False))
    _agree(name, short, whole, entry.small_parts())


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_DEPTH)
def test_repeated_layers_agree_with_every_layer_traced_at_full_depth(name: str) -> None:
    _agree(name, captured(name), capture(ZOO[name].build(), Workload(), repeat=False), ZOO[name].parts)


def test_the_document_lists_every_model_with_its_parameters() -> None:
    text = (EXAMPLES.parent / "docs" / "models.md").read_text()
    for entry in ZOO.values():
        assert f"| {entry.name} | {entry.params:,} | {entry.published} |" in text
        assert f"- {entry.name}: {entry.source}." in text
