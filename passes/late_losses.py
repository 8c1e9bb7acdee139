"""Logits of a model with several losses exist one after the other, each from right before its own backward on."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import fx

from omnicompile.capture.classify import HEAVY, MATMULS
from omnicompile.passes.segments import is_forward

_SOFTMAX = torch.ops.aten._log_softmax.default


def late_losses_pass(gm: fx.GraphModule) -> int:
    """Changes a step graph in place, as it was traced. Returns the number of losses that were moved.

    Before: `z1 = h @ a; s1 = log_softmax(z1); l1 = nll(s1); z2 = g @ b; s2 = ..; l2 = nll(s2); l = l1 + l2;
            dz2 = dsoftmax(s2); dg = dz2 @ b.t(); db = ..; dz1 = dsoftmax(s1); ..`
    After:  `z2 = g @ b; s2 = ..; l2 = nll(s2); dz2 = dsoftmax(s2); dg = dz2 @ b.t(); db = ..;
            z1 = h @ a; s1 = log_softmax(z1); l1 = nll(s1); l = l1 + l2; dz1 = dsoftmax(s1); ..`

    The backward of the last loss comes first, so logits of the others would be kept while it runs. From a loss's
    product on, with the gather of its weight, everything moves in front of the first thing outside that reads any of
    it. Safe: only the order changes, alike on all ranks; what moves is read by nothing before its new place. The
    backward's beginning, a 1 that autograd makes in the loss's shape, becomes a constant first. A single loss stays
    where it is.
    """
    found = [n for n in gm.graph.find_nodes(op="call_function", target=_SOFTMAX) if is_forward(n)]
    if len(found) < 2:
        return 0
    _begin_without_the_loss(gm.graph)
    moved = sum(_move(gm.graph, softmax) for softmax in found)
    if moved:
        gm.graph.lint()
        gm.recompile()
    return moved


def _begin_without_the_loss(graph: fx.Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.ones_like.default):
        source, value = node.all_input_nodes[0], node.meta["val"]
        if is_forward(source) and not is_forward(node) and value.dim() == 0:
            with graph.inserting_before(node):
                one = graph.call_function(
                    torch.ops.aten.full.default, ([], 1), {"dtype": value.dtype, "device": value.device}
                )
            one.meta = dict(node.meta)
            node.replace_all_uses_with(one)
            graph.erase_node(node)


def _move(graph: fx.Graph, softmax: fx.Node) -> bool:
    nodes = list(graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    product = _product(softmax)
    if product is None:
        return False
    moving = _results(product)
    readers = [user for node in moving for user in node.users if user not in moving and user.op != "output"]
    if not readers:
        return False
    first = min(readers, key=place.__getitem__)
    if not any(node.target in HEAVY and not is_forward(node) for node in nodes[place[product] : place[first]]):
        return False
    moving |= _weights(product, moving, nodes[place[first] :])
    for node in sorted(moving, key=place.__getitem__):
        first.prepend(node)
    return True


def _product(softmax: fx.Node) -> fx.Node | None:
    """The product that makes the logits."""
    node = softmax
    while node.target not in MATMULS:
        if node is not softmax and len(node.all_input_nodes) != 1:
            return None
        node = node.all_input_nodes[0]
        if node.op != "call_function" or not is_forward(node):
            return None
    return node


def _results(product: fx.Node) -> set[fx.Node]:
    """It, and what the forward makes of it."""
    found, stack = {product}, [product]
    while stack:
        new = [user for user in stack.pop().users if is_forward(user) and user not in found]
        found.update(new)
        stack += new
    return found


def _weights(product: fx.Node, moving: Collection[fx.Node], after: Sequence[fx.Node]) -> set[fx.Node]:
    """What makes the product's weight of a parameter and is read by nothing else before `after`."""
    later, found = {*after, *moving}, set[fx.Node]()
    for source in product.all_input_nodes:
        chain: list[fx.Node] = []
        while source.op == "call_function" and len(source.all_input_nodes) == 1:
            chain.append(source)
            source = source.all_input_nodes[0]
        if source.op != "placeholder":
            continue
        for node in chain:
            if not all(user in later or user in found for user in node.users):
                break
            found.add(node)
    return found
