"""Gradients added to those of earlier micro-steps inside the step graph."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from omnicompile.passes.accumulate import accumulate_pass
from omnicompile.passes.liveness import peak_bytes
from omnicompile.passes.rank_program import ParamSpec
from omnicompile.passes.replica_sums import sum_over_replicas_pass
from omnicompile.torch_compat import new_fake_mode

_c10d = torch.ops._c10d_functional


def two_layers(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """The loss, gradients of a and b (b's first), and another output."""
    db = x @ b
    da = db.relu() @ a
    return x.sum(), da, db, x + 1


def traced() -> fx.GraphModule:
    with new_fake_mode():
        return make_fx(two_layers)(*(torch.empty(64, 64) for _ in range(3)))


def test_each_gradient_is_added_as_it_is_ready() -> None:
    gm = traced()
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")][1:]
    assert accumulate_pass(gm, names) == tuple(f"kept_{name}" for name in names)
    short = {torch.ops.aten.add_.Tensor: "add_", torch.ops.aten.mm.default: "mm"}
    assert [short[n.target] for n in gm.graph.nodes if n.target in short] == ["mm", "add_", "mm", "add_"]
    values = [torch.randn(64, 64) for _ in range(5)]
    kept = [value.clone() for value in values[3:]]
    loss, da, db, other = two_layers(*values[:3])
    got = gm(*values[:3], *kept)
    for found, want in zip(got, (loss, da + values[3], db + values[4], other), strict=True):
        assert torch.equal(found, want)
    assert got[1] is kept[0] and got[2] is kept[1]  # in the memory that was kept


def test_no_second_set_of_gradients_builds_up() -> None:
    one = 64 * 64 * 4
    plain, added = traced(), traced()
    names = [node.name for node in added.graph.find_nodes(op="placeholder")][1:]
    accumulate_pass(added, names)
    assert peak_bytes(added).total <= peak_bytes(plain).total + len(names) * one - one


def test_sums_over_replicas_are_made_in_the_kept_memory() -> None:
    gm = traced()
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")][1:]
    accumulate_pass(gm, names)
    specs = {
        n: ParamSpec(f"model.layers.{i}.{n}", (64, 64), reduce_axes=("dp_replicate",)) for i, n in enumerate(names)
    }
    assert sum_over_replicas_pass(gm, names, specs, {}) == set(names)
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default)
    calls = gm.graph.find_nodes(op="call_function", target=_c10d.all_reduce_coalesced_.default)
    assert [[node.target for node in call.args[0]] for call in calls] == [[torch.ops.aten.add_.Tensor]] * 2
