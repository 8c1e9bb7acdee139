"""Where a node of a step graph comes from: phase, block and layer.

The trace of a step hands metadata of the forward's nodes on: `phase`, `block`, `role`, `nn_module_stack`. Passes on
step graphs mark what they add with a phase of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import fx

FORWARD = "forward"  # node.meta["phase"] of what the forward computes
RECOMPUTE = "recompute"  # ... of what is run again in the backward
_NUMBERED = re.compile(r"^(.*?\.\d+)(?=\.|$)")


def is_forward(node: fx.Node) -> bool:
    return node.meta.get("phase") == FORWARD


def layer_of(node: fx.Node) -> str:
    """Path of the outermost numbered module ("model.layers.3") that the node was traced in; "" outside of such
    modules."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(entry[0]) for entry in stack.values()]
    found = _NUMBERED.match(paths[-1]) if paths else None
    return found.group(1) if found else ""


def forward_layers(nodes: Iterable[fx.Node]) -> dict[str, list[fx.Node]]:
    """The forward's calls in each layer, in order. A node without a module path (a cast that a pass put in) belongs to
    the layer of its users if they agree."""
    calls = [node for node in nodes if node.op == "call_function" and is_forward(node)]
    found: dict[fx.Node, str] = {}
    for node in reversed(calls):
        layer = layer_of(node)
        if not layer and not node.meta.get("nn_module_stack"):
            users = {found[user] for user in node.users if user in found}
            layer = users.pop() if len(users) == 1 else ""
        found[node] = layer
    layers: dict[str, list[fx.Node]] = {}
    for node in calls:
        if found[node]:
            layers.setdefault(found[node], []).append(node)
    return layers
