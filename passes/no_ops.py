"""Operators that give back what they are given are taken out of a step graph."""

from __future__ import annotations

import torch
from torch import Tensor, fx

_aten = torch.ops.aten
_NOTHING = (_aten.detach.default, _aten.alias.default)
_MAYBE = (
    _aten.permute.default,
    _aten.slice.Tensor,
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.expand.default,
)
_TWICE = (_aten.t.default, _aten.transpose.int)
_ONCE = (_aten.pow.Tensor_Scalar, _aten.mul.Tensor, _aten.mul.Scalar, _aten.div.Tensor, _aten.div.Scalar)


def no_ops_pass(gm: fx.GraphModule) -> int:
    """Traces of autograd are full of them. Changes `gm` in place; returns how many went.

    Before: `a = detach(x); b = slice(a, 0, 0, 8); c = t(b); d = t(c); e = pow(d, 1.0); y = mm(e, w)`, x of 8 rows.
    After: `y = mm(x, w)`.

    Safe in a graph without writes: what goes has the values, the shape, the strides and the dtype of its input. Views
    and operators by 1 only; no copies, which something may need to be apart.
    """
    count = 0
    for node in list(gm.graph.nodes):
        source = _same(node)
        if source is not None:
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)
            count += 1
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return count


def _same(node: fx.Node) -> fx.Node | None:
    """The node that has the same value."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source = node.args[0]
    if node.target in _TWICE and source.target is node.target and isinstance(source.args[0], fx.Node):
        back = set(source.args[1:]) == set(node.args[1:])
        source = source.args[0]
        return source if back and _alike(node, source) else None
    if not _alike(node, source):
        return None
    if node.target in _NOTHING or (node.target in _ONCE and _by_one(node)):
        return source
    if node.target is _aten.permute.default:
        dims = node.args[1]
        assert isinstance(dims, list | tuple)
        return source if list(dims) == list(range(len(dims))) else None
    if node.target is _aten.slice.Tensor:  # of equal shape: all of it, unless backwards, which no slice goes
        return source
    return source if node.target in _MAYBE else None


def _by_one(node: fx.Node) -> bool:
    factor = node.args[1]
    return isinstance(factor, int | float) and not isinstance(factor, bool) and factor == 1 and not node.kwargs


def _alike(one: fx.Node, other: fx.Node) -> bool:
    a, b = one.meta.get("val"), other.meta.get("val")
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.dtype != b.dtype:
        return False
    if any(isinstance(size, torch.SymInt) for size in (*a.shape, *b.shape)):
        return False
    return a.shape == b.shape and a.stride() == b.stride()
