"""Regions of compute between collectives are compiled once per structure."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import make_plan, mixture_model, text_batch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from omnicompile.lowering.driver import default_lower, rank_program, with_outputs
from omnicompile.lowering.graph_capture import capture_forward
from omnicompile.lowering.regions import compile_regions, find_regions
from omnicompile.lowering.step_graph import StepGraph, trace_step
from omnicompile.plan import Mesh, Overlap


def step_of(layers: int, mesh: Mesh, overlap: Overlap | None = None) -> StepGraph:
    captured, _ = capture_forward(mixture_model(layers), text_batch(1))
    names = dict.fromkeys(captured.params.values(), True)
    forward = with_outputs(captured, ("loss",))
    plan = replace(make_plan(("text",), mesh), overlap=overlap or Overlap())
    return trace_step(default_lower(rank_program(forward, plan, names, {32}, torch.float32)))


def keep(module: fx.GraphModule, dynamic: bool) -> fx.GraphModule:
    return module


def compiled(module: fx.GraphModule, dynamic: bool) -> Any:
    return torch.compile(module, backend="aot_eager", dynamic=dynamic, fullgraph=True)


@pytest.mark.parametrize("compile", [keep, compiled])
def test_the_graph_of_regions_computes_the_same(compile: Any) -> None:
    step = step_of(1, Mesh())
    generator = torch.Generator().manual_seed(0)
    arguments = []
    for node in step.gm.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        whole = torch.randint(0, 4, value.shape, generator=generator)
        arguments.append(0.1 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else whole)
    with torch.no_grad():
        want = step.gm(*arguments)
        gm, count = compile_regions(step.gm, compile)
        got = gm(*arguments)
    assert count > 0
    for ours, theirs in zip(got, want):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_none_and_one_row_compile_nothing_anew() -> None:
    """Sizes that depend on data serve any number of rows with one compilation."""
    made = []

    def count(gm: fx.GraphModule, inputs: Any) -> Any:
        made.append(gm)
        return gm

    def work(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x * 2)

    gm = make_fx(work, tracing_mode="symbolic")(torch.randn(6, 4))
    gm, _ = compile_regions(gm, lambda module, dynamic: torch.compile(module, backend=count, dynamic=dynamic))
    for rows in (1, 5, 0, 9, 2):
        x = torch.randn(rows, 4)
        assert torch.equal(gm(x), work(x))
    assert len(made) == 1


@pytest.mark.slow
def test_the_number_of_compilations_does_not_grow_with_depth() -> None:
    mesh = Mesh(dp_shard=2, sp=2, ep=2)
    counts = {layers: compile_regions(step_of(layers, mesh).gm, keep)[1] for layers in (2, 4, 8)}
    # Two layers are the first and the last; from three on there is the region of a layer between them.
    assert counts[4] == counts[8] <= counts[2] + 1, counts


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [Overlap(), Overlap(head_groups=2, expert_chunks=2, prefetch=2)])
def test_a_schedule_of_exchanges_does_not_make_it_grow(overlap: Overlap) -> None:
    few, many = (
        compile_regions(step_of(layers, Mesh(dp_shard=2, sp=2, ep=2), overlap).gm, keep)[1] for layers in (3, 6)
    )
    assert 0 < many <= few


def test_collectives_and_anchors_stay_outside() -> None:
    step = step_of(1, Mesh(sp=2))
    for region in find_regions(step.gm):
        for node in region.nodes:
            assert node.target is operator.getitem or node.target.namespace == "aten"
