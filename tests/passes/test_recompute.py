"""Recompute changes no bit of the result and keeps less from the forward to the backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from omnicompile.capture.api import capture_model
from omnicompile.lowering.step_graph import StepGraph, trace_step
from omnicompile.passes import lower_forward
from omnicompile.passes.liveness import peak_bytes
from omnicompile.passes.recompute import recompute_pass
from omnicompile.passes.segments import FORWARD, RECOMPUTE
from omnicompile.plan import BlockPlan, Mesh
from omnicompile.recompute import Recompute
from omnicompile.workload import Workload

from .models import mixture_model, text_batch
from .parity import captured_for, program_of, whole_values
from .steps import one_rank_step, run_on_all_ranks

BLOCKS = {policy: {"text": BlockPlan(recompute=policy)} for policy in Recompute}
aten = torch.ops.aten


def targets(gm: fx.GraphModule, phase: str) -> list[Any]:
    return [n.target for n in gm.graph.nodes if n.op == "call_function" and n.meta.get("phase") == phase]


# Graphs small enough to read ---------------------------------------------------------------------------------------


class Layered(nn.Module):
    """An embedding, two layers that call `function`, and a loss."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.layers = nn.ModuleList(Layer(function) for _ in range(2))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


class Layer(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def layered_step(
    function: Callable[[Tensor, Tensor], Tensor], policy: Recompute
) -> tuple[fx.GraphModule, list[Tensor]]:
    """A step graph on one rank, and arguments for it."""
    model, batch = Layered(function), text_batch(0, 16, vocab=20)
    captured, inputs = captured_for(model, batch)
    original = program_of(captured, model, Mesh(), BLOCKS[policy], 16)
    step = trace_step(lower_forward(original))
    values = whole_values(original, captured, model) | inputs.prepare(batch)
    names = [node.name for node in step.gm.graph.find_nodes(op="placeholder")]
    return step.gm, [values.get(name, torch.tensor(10.0)) for name in names]


def smooth(x: Tensor, weight: Tensor) -> Tensor:
    return x + (x @ weight).sin().tanh()


def random(x: Tensor, weight: Tensor) -> Tensor:
    return x + torch.randn_like(x) * (x @ weight).sin()


def choosing(x: Tensor, weight: Tensor) -> Tensor:
    index = (x @ weight).topk(2, -1).indices
    return x + x.exp().sin().cos().gather(-1, index).sum(-1, keepdim=True)


@pytest.mark.parametrize("policy", [Recompute.SELECTIVE, Recompute.EXCEPT_ATTENTION, Recompute.FULL])
def test_what_the_backward_reads_is_made_in_the_backward_of_its_layer(policy: Recompute) -> None:
    gm, arguments = layered_step(smooth, policy)
    whole, _ = layered_step(smooth, Recompute.NONE)
    assert all(torch.equal(a, b) for a, b in zip(gm(*arguments), whole(*arguments), strict=True))
    again = targets(gm, RECOMPUTE)
    assert again.count(aten.sin.default) == again.count(aten.tanh.default) == 2
    assert (aten.mm.default in again) == (policy is not Recompute.SELECTIVE)
    phases = [n.meta.get("phase") for n in gm.graph.nodes if n.op == "call_function"]
    last_forward = max(i for i, phase in enumerate(phases) if phase == FORWARD)
    copies = [i for i, phase in enumerate(phases) if phase == RECOMPUTE]
    assert last_forward < copies[0]
    assert copies[-1] - copies[0] >= len(copies), "the second layer's backward stands between"


def test_attention_runs_once_unless_all_is_recomputed() -> None:
    forwards = {}
    for policy in Recompute:
        step, _ = one_rank_step("moe", policy)
        again = targets(step.gm, RECOMPUTE)
        forwards[policy] = again.count(torch.ops.omnicompile.attention.default)
    assert forwards.pop(Recompute.FULL) > 0 and set(forwards.values()) == {0}


def test_random_numbers_are_not_drawn_again() -> None:
    gm, _ = layered_step(random, Recompute.FULL)
    assert targets(gm, FORWARD).count(aten.randn_like.default) == 2
    assert aten.randn_like.default not in targets(gm, RECOMPUTE)
    assert aten.mm.default in targets(gm, RECOMPUTE)


def test_a_choice_is_taken_once() -> None:
    gm, arguments = layered_step(choosing, Recompute.FULL)
    whole, _ = layered_step(choosing, Recompute.NONE)
    assert aten.exp.default in targets(gm, RECOMPUTE)
    assert aten.topk.default not in targets(gm, RECOMPUTE)
    assert all(torch.equal(a, b) for a, b in zip(gm(*arguments), whole(*arguments), strict=True))


def test_a_layer_that_keeps_little_is_left_alone() -> None:
    gm, _ = layered_step(lambda x, weight: x @ weight, Recompute.FULL)
    assert targets(gm, RECOMPUTE) == []


# Models ------------------------------------------------------------------------------------------------------------


def results(kind: str) -> dict[Recompute, tuple[StepGraph, tuple[Tensor, ...]]]:
    found = {}
    for policy in Recompute:
        step, arguments = one_rank_step(kind, policy)
        with torch.no_grad():
            found[policy] = step, step.gm(*arguments)
    return found


@pytest.mark.parametrize("kind", ["vlm", "moe"])
def test_a_model_gives_the_same_bits_and_takes_less(kind: str) -> None:
    found = results(kind)
    want = found[Recompute.NONE][1]
    for _, outputs in found.values():
        assert all(torch.equal(a, b) for a, b in zip(outputs, want, strict=True))
    none, selective, *more = (peak_bytes(found[policy][0].gm).beyond_inputs for policy in Recompute)
    assert max(more) < selective < none


def test_a_layer_keeps_what_the_planner_says() -> None:
    """Under `full` also the choices: of each of 128 tokens two experts and two places, and four counts."""
    program = capture_model(mixture_model(), Workload(seq_len=128))
    (layer,) = (segment for segment in program.segments if segment.role == "layer")
    choices = dict.fromkeys((Recompute.EXCEPT_ATTENTION, Recompute.FULL), 2 * 128 * 2 * 8 + 4 * 8)
    for policy in choices.keys() | {Recompute.SELECTIVE}:
        step, _ = one_rank_step("moe", Recompute.NONE)
        for done in recompute_pass(step.gm, BLOCKS[policy]):
            expressions = [layer.saved[p].nbytes for p in (Recompute.NONE, policy)]
            priced = [e.subs(dict.fromkeys(e.free_symbols, 128)) for e in expressions]
            assert [done.kept_before, done.kept] == [priced[0], priced[1] + choices.get(policy, 0)]


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [("vlm", Mesh(sp=2)), ("vlm", Mesh(dp_shard=2)), ("moe", Mesh(sp=2, ep=2))],
    ids=["vlm sp", "vlm fsdp", "moe sp ep"],
)
def test_ranks_give_the_same_bits(kind: str, mesh: Mesh) -> None:
    _, want = run_on_all_ranks(kind, Recompute.NONE, mesh)
    for policy in (Recompute.SELECTIVE, Recompute.EXCEPT_ATTENTION, Recompute.FULL):
        step, got = run_on_all_ranks(kind, policy, mesh)
        assert step.recomputed > 0
        for mine, theirs in zip(got, want, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
