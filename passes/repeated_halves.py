"""Whether the two halves of a table's last dimension are the same, whatever the batch: kernels then read only one."""

from __future__ import annotations

import torch
from torch import Tensor, fx

_MOST_ELEMENTS = 2**26  # of a value on the way; a larger one is not computed
_TRIES = 2
_INTEGERS = 7  # placeholders of integers hold numbers below, which are places in most tables


def repeats_halves(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Computed for random values of the placeholders that `node` is made of; values that differ in the two halves
    differ there almost surely. False for what cannot be computed so."""
    cone = _cone(gm.graph, node)
    if not all(_computable(one) for one in cone):
        return False
    generator = torch.Generator().manual_seed(0)
    try:
        return all(_same_halves(gm, cone, node, generator) for _ in range(_TRIES))
    except (RuntimeError, IndexError, ValueError):  # an operator that random places do not suit
        return False


def _cone(graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    """`node` and all it is made of, in order."""
    needed, stack = set[fx.Node](), [node]
    while stack:
        one = stack.pop()
        if one not in needed:
            needed.add(one)
            stack += one.all_input_nodes
    return [one for one in graph.nodes if one in needed]


def _computable(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if isinstance(value, Tensor) and value.numel() > _MOST_ELEMENTS:
        return False
    if node.op == "placeholder":
        return isinstance(value, Tensor)
    if node.op != "call_function":
        return False
    target = node.target
    return not isinstance(target, torch._ops.OpOverload) or (
        target.namespace == "aten" and torch.Tag.nondeterministic_seeded not in target.tags
    )


def _same_halves(gm: fx.GraphModule, cone: list[fx.Node], node: fx.Node, generator: torch.Generator) -> bool:
    values: dict[fx.Node, object] = {}
    for one in cone:
        if one.op == "placeholder":
            values[one] = _random(one.meta["val"], generator)
        else:
            args, kwargs = fx.map_arg((one.args, one.kwargs), values.__getitem__)
            values[one] = one.target(*args, **kwargs)  # type: ignore[operator]
    table = values[node]
    if not isinstance(table, Tensor) or table.shape[-1] % 2:
        return False
    first, second = table.chunk(2, -1)
    return torch.equal(first, second)


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    if like.is_floating_point():
        return torch.randn(like.shape, generator=generator).to(like.dtype)
    return torch.randint(0, _INTEGERS, like.shape, generator=generator).to(like.dtype)
