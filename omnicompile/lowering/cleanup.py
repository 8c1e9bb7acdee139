"""Take out of an exported graph what only checks or wraps."""

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
    graph.eliminate_dead_code()
    graph.lint()
    gm.recompile()


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
