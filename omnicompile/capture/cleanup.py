"""Small rewrites that make a traced forward one flat graph of operators."""

from __future__ import annotations

import torch
from torch import fx

from omnicompile.torch_compat import is_autocast_switch, is_grad_switch

aten = torch.ops.aten

# Checks that hold by construction in a static trace; nothing depends on them.
_CHECKS = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_async.msg,
        aten._assert_async.default,
        aten._assert_scalar.default,
        aten.sym_constrain_range_for_size.default,
    }
)


def drop_checks(graph: fx.Graph) -> None:
    """`_assert_*(x)` -> nothing."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and node.target in _CHECKS and not node.users:
            graph.erase_node(node)


def drop_switches(graph: fx.Graph) -> None:
    """Take out gradient and autocast switches; what is computed with gradients off is detached where it is used.

    Before: `_set_grad_enabled(False); t = cos(x); _set_grad_enabled(True); y = t * w`.
    After: `t = cos(x); d = detach(t); y = d * w`. No gradient flows, as in the original. Autocast needs nothing: the
    casts that it made are in the graph.
    """
    enabled = True
    without: set[fx.Node] = set()
    for node in list(graph.nodes):
        if is_grad_switch(node):
            enabled = bool(node.args[0])
        elif is_autocast_switch(node):
            continue
        elif not enabled and node.op == "call_function":
            without.add(node)
    for node in reversed(list(graph.nodes)):
        if is_grad_switch(node) or is_autocast_switch(node):
            graph.erase_node(node)
    for node in without:
        outside = [u for u in node.users if u not in without]
        if outside and isinstance(node.meta.get("val"), torch.Tensor):
            with graph.inserting_after(node):
                detached = graph.call_function(aten.detach.default, (node,))
            detached.meta.update(node.meta)
            for user in outside:
                user.replace_input_with(node, detached)


def clean(module: fx.GraphModule) -> None:
    """All rewrites of this file, then dead code; the module is recompiled."""
    drop_switches(module.graph)
    drop_checks(module.graph)
    module.graph.eliminate_dead_code()
