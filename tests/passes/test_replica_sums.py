"""Sums over replicas inside a step graph: where they are launched, what is copied first, what they give."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from omnicompile.passes.rank_program import ParamSpec
from omnicompile.passes.replica_sums import sum_over_replicas_pass
from omnicompile.torch_compat import new_fake_mode

_c10d = torch.ops._c10d_functional
SUM = _c10d.all_reduce_coalesced_.default


def traced(function: object, count: int) -> tuple[fx.GraphModule, list[str]]:
    with new_fake_mode():
        gm = make_fx(function)(*(torch.empty(4, 4) for _ in range(count)))  # type: ignore[arg-type]
    return gm, [node.name for node in gm.graph.find_nodes(op="placeholder")][1:]


def specs(names: list[str], layers: list[int], axes: tuple[str, ...] = ("dp_replicate",)) -> dict[str, ParamSpec]:
    return {n: ParamSpec(f"model.layers.{i}.{n}", (4, 4), reduce_axes=axes) for n, i in zip(names, layers)}


def layers(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    """Gradients of c and b (layer 1), then a (layer 0), each element-wise work after a product."""
    dc = (x @ c) * 2
    db = (dc @ b) * 2
    da = (db @ a) * 2
    return x.sum(), da, db, dc


def test_one_launch_a_layer_as_its_gradients_are_ready() -> None:
    gm, names = traced(layers, 4)
    assert sum_over_replicas_pass(gm, names, specs(names, [0, 1, 1]), {"dp_replicate": "7"}) == set(names)
    short = {SUM: "sum", torch.ops.aten.mm.default: "mm", _c10d.wait_tensor.default: "wait"}
    order = [short[n.target] for n in gm.graph.nodes if n.target in short]
    assert order == ["mm", "mm", "sum", "mm", "sum", "wait", "wait", "wait"]
    first, second = gm.graph.find_nodes(op="call_function", target=SUM)
    assert [len(first.args[0]), len(second.args[0])] == [2, 1] and first.args[1:] == ("sum", "7")
    # c's gradient is read by b's: it is summed in memory of its own
    copied = [node.target is torch.ops.aten.clone.default for node in first.args[0]]
    assert copied == [True, True] and second.args[0][0].target is torch.ops.aten.mul.Tensor


def test_groups_that_are_not_bound_keep_their_axes() -> None:
    gm, names = traced(layers, 4)
    sum_over_replicas_pass(gm, names, specs(names, [0, 0, 0]), {})
    assert {node.args[2] for node in gm.graph.find_nodes(op="call_function", target=SUM)} == {"axes:dp_replicate"}


def test_what_needs_no_sum_is_left_alone() -> None:
    gm, names = traced(layers, 4)
    before = gm.code
    assert sum_over_replicas_pass(gm, names, specs(names, [0, 1, 1], ()), {}) == set() and gm.code == before


def test_a_gradient_of_two_parameters_is_summed_once() -> None:
    def shared(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        grad = x @ a
        return (b.sum(), grad, grad)

    gm, names = traced(shared, 3)
    assert sum_over_replicas_pass(gm, names, specs(names, [0, 0]), {}) == set(names)
    (call,) = gm.graph.find_nodes(op="call_function", target=SUM)
    results = gm.graph.output_node().args[0]
    assert len(call.args[0]) == 1 and results[1] is results[2]
    assert results[1].target is _c10d.wait_tensor.default


def test_a_transposed_gradient_is_made_contiguous() -> None:
    def transposed(x: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        return a.sum(), (x @ a).t()

    gm, names = traced(transposed, 2)
    sum_over_replicas_pass(gm, names, specs(names, [0]), {})
    (call,) = gm.graph.find_nodes(op="call_function", target=SUM)
    assert call.args[0][0].target is torch.ops.aten.clone.default
    assert call.args[0][0].meta["val"].is_contiguous()


def test_a_scattered_gradient_is_waited_for_when_the_next_layers_is_launched() -> None:
    """Both waits stood at the end; the first is put where the second scatter is, its sum behind it."""

    def scattered(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        db = x @ b
        first = _c10d.reduce_scatter_tensor(db, "sum", 2, "shard")
        da = db.relu() @ a
        second = _c10d.reduce_scatter_tensor(da, "sum", 2, "shard")
        third = x @ da
        gb, ga = _c10d.wait_tensor(first), _c10d.wait_tensor(second)
        return third.sum(), ga, gb

    gm, names = traced(scattered, 3)
    assert sum_over_replicas_pass(gm, names, specs(names, [0, 1]), {}) == set(names)
    short = {SUM: "sum", torch.ops.aten.mm.default: "mm", _c10d.wait_tensor.default: "wait"}
    short |= {_c10d.reduce_scatter_tensor.default: "scatter"}
    order = [short[n.target] for n in gm.graph.nodes if n.target in short]
    assert order == ["mm", "scatter", "mm", "wait", "sum", "scatter", "mm", "wait", "sum", "wait", "wait"]
