"""Group element-wise and reduction work into the kernels that Inductor makes of it."""

from __future__ import annotations

from torch import fx

from omnicompile.capture.classify import HEAVY, is_free, is_fusible, storage_of


def _depths(nodes: list[fx.Node]) -> dict[fx.Node, int]:
    """How many unfusible operators lie on the longest path that leads to each node."""
    depth: dict[fx.Node, int] = {}
    for node in nodes:
        inputs = [i for i in node.all_input_nodes if i in depth]
        step = {i: 0 if is_fusible(i) or is_free(i) else 1 for i in inputs}
        depth[node] = max((depth[i] + step[i] for i in inputs), default=0)
    return depth


def fuse(nodes: list[fx.Node]) -> list[list[fx.Node]]:
    """Groups of nodes that become one kernel each; an unfusible node is a group of its own, free nodes are in none.

    Two connected fusible nodes join when equally many unfusible operators precede them: then none lies between, and the
    fused kernel depends on nothing that depends on it.
    """
    depth = _depths(nodes)
    group_of: dict[fx.Node, list[fx.Node]] = {}
    groups: list[list[fx.Node]] = []
    for node in nodes:
        if is_free(node):
            continue
        if not is_fusible(node):
            groups.append([node])
            continue
        sources = (storage_of(i) for i in node.all_input_nodes)
        joined = [group_of[s] for s in sources if s in group_of and depth[s] == depth[node]]
        if not joined:
            group_of[node] = [node]
            groups.append(group_of[node])
            continue
        target = joined[0]
        target.append(node)
        group_of[node] = target
        for other in joined[1:]:
            if other is not target:
                for member in other:
                    group_of[member] = target
                target.extend(other)
                groups.remove(other)
    return groups


def group_traffic(group: list[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """(read, written): the tensors that a kernel reads from memory, and those of its results that are used outside."""
    inside = set(group)
    read: dict[fx.Node, None] = {}
    for node in group:
        for source in node.all_input_nodes:
            base = storage_of(source)
            if base not in inside:
                read[base] = None
    written = [n for n in group if any(_leaves(u, inside) for u in n.users) or not n.users]
    return list(read), written


def _leaves(user: fx.Node, inside: set[fx.Node]) -> bool:
    """True if a value that `user` reads must be in memory: `user`, or what reads a view it makes, is outside."""
    if user in inside:
        return False
    if user.op == "call_function" and is_free(user) and user.target not in HEAVY:
        return any(_leaves(u, inside) for u in user.users) if user.users else False
    return True
