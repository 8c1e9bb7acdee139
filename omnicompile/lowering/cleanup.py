"""Take out of an exported graph what only checks or wraps, and in-place changes of values that nothing else sees."""

from __future__ import annotations

import torch
from torch import fx

_CHECKS = (torch.ops.aten._assert_tensor_metadata.default,)


def clean(gm: fx.GraphModule) -> None:
    """Drop metadata checks and guards, and write no-grad regions in line with detached results.

    wrap_with_set_grad_enabled(False, submodule, a, b)   ->   ops of the submodule; detach(out)
    """
    graph = gm.graph
    for node in list(graph.nodes):
        if node.target in _CHECKS or (node.op == "call_module" and node.target == "_guards_fn"):
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.op == "call_function" and "wrap_with_" in str(node.target):
            _inline(gm, node)
    for node in list(graph.nodes):
        if (functional := _functional_variant(node)) is not None and not _aliased(node.args[0]):
            _make_functional(node, functional)
    graph.eliminate_dead_code()
    graph.lint()
    gm.recompile()


def _functional_variant(node: fx.Node) -> torch._ops.OpOverload | None:
    """aten::add.Tensor for aten::add_.Tensor; None for what changes nothing in place or has no such twin."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    name = target._schema.name.removeprefix("aten::")
    if not name.endswith("_") or name.startswith("_") or not target._schema.is_mutable:
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    overload = target._overloadname
    return getattr(packet, overload) if packet is not None and overload in packet.overloads() else None


def _aliased(base: object) -> bool:
    """Whether changing `base` in place may be seen through another node: it is no fresh value, or it has views."""
    if not isinstance(base, fx.Node) or base.op != "call_function":
        return True
    return _is_view(base) or any(_is_view(user) for user in base.users)


def _is_view(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return True
    # Composite operators (reshape, contiguous, to) may return their input.
    return target.is_view or torch.Tag.maybe_aliasing_or_mutating in target.tags


def _make_functional(node: fx.Node, functional: torch._ops.OpOverload) -> None:
    """x.add_(y); f(x)   ->   z = x.add(y); f(z)"""
    base = node.args[0]
    assert isinstance(base, fx.Node)
    node.target = functional
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    base.replace_all_uses_with(node, delete_user_cb=lambda user: order[user] > order[node])


def _inline(gm: fx.GraphModule, node: fx.Node) -> None:
    position = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
    holder = node.args[position]
    assert isinstance(holder, fx.Node)
    inner = gm.get_submodule(str(holder.target))
    assert isinstance(inner, fx.GraphModule)
    clean(inner)
    no_grad = "set_grad_enabled" in str(node.target) and node.args[0] is False
    env = dict(zip(inner.graph.find_nodes(op="placeholder"), node.args[position + 1 :]))
    results: list[fx.Node] = []
    with gm.graph.inserting_before(node):
        for item in inner.graph.nodes:
            if item.op == "output":
                results = [env[x] for x in item.args[0]]
            elif item.op != "placeholder":
                env[item] = gm.graph.node_copy(item, lambda x: env[x])
        if no_grad:
            results = [_detached(gm.graph, x) for x in results]
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)


def _detached(graph: fx.Graph, node: fx.Node) -> fx.Node:
    result = graph.call_function(torch.ops.aten.detach.default, (node,))
    result.meta = dict(node.meta)
    return result
