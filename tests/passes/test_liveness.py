"""Bytes alive in a graph, counted by walking it, are those that running it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from omnicompile.passes.liveness import Compiled, peak_bytes
from omnicompile.plan import Mesh
from omnicompile.recompute import Recompute
from omnicompile.torch_compat import measured_peak, new_fake_mode

from .steps import first_rank_step, one_rank_step


def chain(x: Tensor) -> Tensor:
    return (x + 1).sin().cos().sum()


def view_keeps_its_source(x: Tensor) -> Tensor:
    y = x + 1
    row = y.view(10, 10)[0]
    return (x * 2).sum() + row.sum()


def element_of_a_tuple(x: Tensor) -> Tensor:
    values, _ = torch.ops.aten.topk.default(x, 50)
    return (x * 2).sum() + values.sum()


def in_place(x: Tensor) -> Tensor:
    y = x + 1
    y.mul_(2)
    return y.sin().sum()


def parts_of_one(x: Tensor) -> Tensor:
    left, right = (x + 1).split(50)
    return left.sin().sum() + right.sum()


@pytest.mark.parametrize("function", [chain, view_keeps_its_source, element_of_a_tuple, in_place, parts_of_one])
def test_small_graphs(function: Callable[..., Any]) -> None:
    x = torch.arange(100, dtype=torch.float32)
    gm = make_fx(function)(x)
    assert peak_bytes(gm).total == measured_peak(gm, [x])


def test_what_comes_into_a_region_is_held_until_it_returns() -> None:
    def work(x: Tensor) -> Tensor:
        a = x.sin()  # dies with b, or with the region of b, c and d
        b = a.cos()
        c = b.tan()
        return c.exp()

    gm = make_fx(work)(torch.arange(100, dtype=torch.float32))
    _, *region = [node for node in gm.graph.nodes if node.op == "call_function"]
    plain, held = peak_bytes(gm), peak_bytes(gm, compiled=Compiled(regions=[region]))
    assert (plain.total, held.total) == (3 * 400, 4 * 400)


@pytest.mark.parametrize("policy", list(Recompute))
@pytest.mark.parametrize("kind", ["vlm", "moe"])
def test_forward_and_backward_of_a_model(kind: str, policy: Recompute) -> None:
    step, arguments = one_rank_step(kind, policy)
    peak = peak_bytes(step.gm)
    with torch.no_grad():
        assert peak.total == measured_peak(step.gm, arguments)
    assert peak.inputs == sum(value.untyped_storage().nbytes() for value in arguments)
    assert sum(peak.holders.values()) == peak.beyond_inputs


@pytest.mark.parametrize(
    ("kind", "policy", "mesh"),
    [("vlm", Recompute.FULL, Mesh(dp_shard=2)), ("moe", Recompute.NONE, Mesh(dp_shard=4))],
    ids=["vlm full", "moe none"],
)
def test_a_rank_with_its_collectives(kind: str, policy: Recompute, mesh: Mesh) -> None:
    step, arguments = first_rank_step(kind, policy, mesh)
    assert any("coalesced" in str(node.target) for node in step.gm.graph.nodes)
    with torch.no_grad():
        assert peak_bytes(step.gm).total == measured_peak(step.gm, arguments)
    assert peak_bytes(step.gm, in_flight=True).total >= peak_bytes(step.gm).total


def test_a_size_that_is_not_known_is_named() -> None:
    with new_fake_mode():
        x = torch.ones(8)
        gm = make_fx(lambda x: x.nonzero().float().sum())(x)
    with pytest.raises(ValueError, match="known only at run time"):
        peak_bytes(gm)
