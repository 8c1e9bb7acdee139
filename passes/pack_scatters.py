"""A coalesced reduce-scatter as one of a flat buffer, for backends that run coalesced ones tensor by tensor (gloo)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

_c10d = torch.ops._c10d_functional
_aten = torch.ops.aten
_TOGETHER = _c10d.reduce_scatter_tensor_coalesced.default
_WAIT = _c10d.wait_tensor.default


def pack_scatters_pass(gm: fx.GraphModule) -> int:
    """Changes a step graph in place. Returns the number of collectives that were packed.

    Before: `C = reduce_scatter_coalesced([a, b], "sum", 2, group); ga = wait(C[0]); gb = wait(C[1])`.
    After:  `f = cat([a.view(2, -1), b.view(2, -1)], 1).view(-1); F = reduce_scatter(f, "sum", 2, group); w = wait(F);
            ga = w[: n].view(..); gb = w[n :].view(..)`.

    What one rank is to have of every tensor lies together in the buffer. The price is one copy of the gradients; NCCL
    needs none and keeps them coalesced. Safe: every element is summed over the same ranks as before, and the results
    share a buffer but no element of it. Runs last.
    """
    calls = [node for node in gm.graph.find_nodes(op="call_function", target=_TOGETHER) if len(node.args[0]) > 1]
    for call in calls:
        _pack(gm.graph, call)
    if calls:
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()
    return len(calls)


def _pack(graph: fx.Graph, call: fx.Node) -> None:
    inputs, reduction, ranks, group = call.args
    assert isinstance(inputs, list | tuple) and isinstance(ranks, int)
    index = {node: i for i, node in enumerate(graph.nodes)}
    items = sorted(call.users, key=lambda item: item.args[1])  # type: ignore[arg-type, return-value]
    waits = [wait for item in items for wait in item.users]
    if not all(wait.target is _WAIT for wait in waits):
        return
    with graph.inserting_before(call):
        rows = [
            _call(graph, _aten.reshape.default, (node, [ranks, -1]), _value(node).reshape(ranks, -1), call)
            for node in inputs
        ]
        value = torch.cat([_value(row) for row in rows], 1)
        whole = _call(graph, _aten.cat.default, (rows, 1), value, call)
        flat = _call(graph, _aten.view.default, (whole, [-1]), value.view(-1), call)
        arguments = (flat, reduction, ranks, group)
        result = value.new_empty(value.shape[1])
        launch = _call(graph, _c10d.reduce_scatter_tensor.default, arguments, result, call)
    with graph.inserting_before(min(waits, key=index.__getitem__)):
        arrived = _call(graph, _WAIT, (launch,), result, call)
    start = 0
    for node, item in zip(inputs, items):
        shape = [_value(node).shape[0] // ranks, *_value(node).shape[1:]]
        end = start + math.prod(shape)
        for wait in list(item.users):
            with graph.inserting_before(wait):
                part = _call(graph, _aten.slice.Tensor, (arrived, 0, start, end), result[start:end], wait)
                own = _call(graph, _aten.view.default, (part, shape), result[start:end].view(shape), wait)
            wait.replace_all_uses_with(own)
            graph.erase_node(wait)
        graph.erase_node(item)
        start = end
    graph.erase_node(call)


def _value(node: fx.Node) -> Tensor:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value


def _call(
    graph: fx.Graph, target: torch._ops.OpOverload, args: tuple[object, ...], value: Tensor, like: fx.Node
) -> fx.Node:
    node = graph.call_function(target, args)  # type: ignore[arg-type]
    node.meta = {**like.meta, "val": value}
    return node
