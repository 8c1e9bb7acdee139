"""Small rewrites that make a traced forward one flat graph of operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

# Checks that hold by construction in a static trace; nothing depends on them.
_CHECKS = frozenset({aten._assert_tensor_metadata.default, aten._assert_async.msg, aten._assert_async.default,
                     aten._assert_scalar.default, aten.sym_constrain_range_for_size.default})  # fmt: skip


def drop_checks(graph: fx.Graph) -> None:
    """`_assert_*(x)` -> nothing."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and node.target in _CHECKS and not node.users:
            graph.erase_node(node)


def _is_region(node: fx.Node) -> bool:
    """A higher-order node that runs a submodule with gradients off or another autocast state."""
    return node.op == "call_function" and str(node.target) in ("wrap_with_set_grad_enabled", "wrap_with_autocast")


def inline_regions(module: fx.GraphModule) -> None:
    """Put the body of `with torch.no_grad()` / `with autocast()` regions in place.

    Before: `w = wrap_with_set_grad_enabled(False, body, x); y = w[0]`. After: `t = body's operators(x); y = detach(t)`.
    The results of a no-grad region are detached, so that no gradient flows, as in the original.
    """
    graph = module.graph
    for node in list(graph.nodes):
        if _is_region(node):
            _inline(module, node)


def _inline(module: fx.GraphModule, node: fx.Node) -> None:
    no_grad = str(node.target) == "wrap_with_set_grad_enabled" and node.args[0] is False
    body_at = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
    body_node = node.args[body_at]
    assert isinstance(body_node, fx.Node)
    body = module.get_submodule(str(body_node.target))
    assert isinstance(body, fx.GraphModule)
    inline_regions(body)
    env: dict[fx.Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), node.args[body_at + 1 :]))
    results: Any = ()
    with module.graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "output":
                results = inner.args[0]
            elif inner.op != "placeholder":
                env[inner] = module.graph.node_copy(inner, env.__getitem__)
        values = [env[r] if isinstance(r, fx.Node) else r for r in results]
        if no_grad:
            values = [_detached(module.graph, v) for v in values]
    for user in list(node.users):
        user.replace_all_uses_with(values[user.args[1]])
        module.graph.erase_node(user)
    module.graph.erase_node(node)
    if not body_node.users:
        module.graph.erase_node(body_node)


def _detached(graph: fx.Graph, value: Any) -> Any:
    if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), torch.Tensor):
        return value
    detach = graph.call_function(aten.detach.default, (value,))
    detach.meta.update(value.meta)
    return detach


def clean(module: fx.GraphModule) -> None:
    """All rewrites of this file, then dead code; the module is recompiled."""
    inline_regions(module)
    drop_checks(module.graph)
    module.graph.eliminate_dead_code()
    module.recompile()
