"""Run parts of the forward again in the backward instead of keeping what they gave.

    y = gelu(x @ w); ...; dz = dy * gelu'(x @ w)      keeps x @ w from the forward to the backward
 -> y = gelu(x @ w); ...; z = x @ w; dz = dy * gelu'(z)      keeps x

Per layer (an element of a module list): what another layer reads is kept, which is the layer's output; of the rest,
SELECTIVE runs again what is bandwidth-bound, FULL everything. Kept in any case: results of random operators, storages
that are changed in place, numbers, and gathered parameters, which have a pass of their own.

Safe: the operators that are run again are functions of their inputs, and their inputs are still alive; collectives are
run again on all ranks alike, because the graph is the same on all.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from omnicompile.capture.classify import is_cheap, is_view
from omnicompile.recompute import Recompute

FORWARD = "forward"  # node.meta["phase"] of what the forward computes
_LAYER = re.compile(r"^(.*?\.\d+)(?:\.|$)")
_GATHER = torch.ops._c10d_functional.all_gather_into_tensor.default
_WAIT = torch.ops._c10d_functional.wait_tensor.default


def is_forward(node: fx.Node) -> bool:
    return node.meta.get("phase") == FORWARD


def layer_of(node: fx.Node) -> str:
    """Path of the outermost list element that the node was traced in; "" outside of lists."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    found = _LAYER.match(paths[-1]) if paths else None
    return found.group(1) if found else ""


def recompute_pass(gm: fx.GraphModule, policies: Mapping[str, Recompute]) -> int:
    """Apply the policy of each block (node.meta["block"]) to its layers, in place; returns how many nodes were added."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    pinned = _mutated(gm) | _parameter_gathers(gm)
    layers: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        policy = policies.get(node.meta.get("block", ""), Recompute.NONE)
        if is_forward(node) and node.op == "call_function" and policy is not Recompute.NONE and layer_of(node):
            layers.setdefault(layer_of(node), []).append(node)
    added = sum(_recompute_layer(gm.graph, nodes, policies, pinned, order) for nodes in layers.values())
    if added:
        gm.graph.lint()
        gm.recompile()
    return added


def _recompute_layer(
    graph: fx.Graph,
    nodes: list[fx.Node],
    policies: Mapping[str, Recompute],
    pinned: set[fx.Node],
    order: dict[fx.Node, int],
) -> int:
    members = set(nodes)
    again = {n for n in nodes if n not in pinned and _may_run_again(n, policies[n.meta["block"]])}
    again = {n for n in again if not _read_elsewhere(n, members)}
    wanted = {n for n in again if any(not is_forward(u) and u.op == "call_function" for u in n.users)}
    closure, stack = set(wanted), list(wanted)
    while stack:
        for source in stack.pop().all_input_nodes:
            if source in again and source not in closure:
                closure.add(source)
                stack.append(source)
    readers = {u for n in wanted for u in n.users if not is_forward(u) and u.op == "call_function"}
    if not readers:
        return 0
    copies: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(min(readers, key=lambda n: order.get(n, 0))):
        for node in sorted(closure, key=lambda n: order[n]):
            copies[node] = graph.node_copy(node, lambda x: copies.get(x, x))
            copies[node].meta["phase"] = "recompute"
    for reader in readers:
        for source in list(reader.all_input_nodes):
            if source in copies:
                reader.replace_input_with(source, copies[source])
    return len(copies)


def _may_run_again(node: fx.Node, policy: Recompute) -> bool:
    """Judged by the node, or by its call for an element of a tuple."""
    call = node.args[0] if node.target is operator.getitem and isinstance(node.args[0], fx.Node) else node
    target = call.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    value = node.meta.get("val")
    if not isinstance(value, Tensor | tuple | list):
        return False
    return policy is Recompute.FULL or (target.namespace == "aten" and is_cheap(node))


def _read_elsewhere(node: fx.Node, members: set[fx.Node]) -> bool:
    """Whether another layer, or what lies outside layers, reads it in the forward."""
    return any(is_forward(user) and user not in members for user in node.users)


def _root(node: fx.Node) -> fx.Node:
    while is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _mutated(gm: fx.GraphModule) -> set[fx.Node]:
    """Every node that shares storage with something that is changed in place."""
    roots = set()
    for node in gm.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            roots.add(_root(node.all_input_nodes[0]))
            roots.add(node)
    return {node for node in gm.graph.nodes if _root(node) in roots or node in roots}


def _parameter_gathers(gm: fx.GraphModule) -> set[fx.Node]:
    """Gathers of parameters, with what only feeds them."""
    found: set[fx.Node] = set()
    for gather in gm.graph.find_nodes(op="call_function", target=_GATHER):
        chain, node = [gather], gather
        while len(node.all_input_nodes) == 1 and node.op != "placeholder":
            node = node.all_input_nodes[0]
            chain.append(node)
        if node.op == "placeholder":
            found.update(chain)
            found.update(user for user in gather.users if user.target is _WAIT)
    return found
