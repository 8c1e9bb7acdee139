"""Group element-wise and reduction work into the kernels that Inductor makes of it."""

from __future__ import annotations

from torch import fx

from omnicompile.capture.classify import HEAVY, is_free, is_fusible, is_in_place, storage_of


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
    fused kernel depends on nothing that depends on it. So do work whose results one fused kernel alone reads and that
    kernel, wherever it stands, and all writes into parts of one buffer.
    """
    depth = _depths(nodes)
    group_of: dict[fx.Node, list[fx.Node]] = {}
    groups: list[list[fx.Node]] = []
    buffers: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        if is_free(node):
            continue
        if not is_fusible(node):
            groups.append([node])
            continue
        sources = [storage_of(i) for i in node.all_input_nodes]
        joined = [group_of[s] for s in sources if s in group_of and depth[s] == depth[node]]
        if is_in_place(node) and storage_of(node) in buffers:
            joined.insert(0, buffers[storage_of(node)])
        if not joined:
            group_of[node] = [node]
            groups.append(group_of[node])
        else:
            joined[0].append(node)
            group_of[node] = joined[0]
            for other in joined[1:]:
                _merge(other, group_of[node], groups, group_of)
        if is_in_place(node):
            buffers[storage_of(node)] = group_of[node]
    _pull_into_readers(groups, group_of)
    return groups


def _merge(
    group: list[fx.Node], into: list[fx.Node], groups: list[list[fx.Node]], group_of: dict[fx.Node, list[fx.Node]]
) -> None:
    """Move the members of `group`, before those of `into` so that results stay last."""
    if group is into or not any(g is group for g in groups):
        return
    for member in group:
        group_of[member] = into
    into[:0] = group
    groups[:] = [g for g in groups if g is not group]


def _pull_into_readers(groups: list[list[fx.Node]], group_of: dict[fx.Node, list[fx.Node]]) -> None:
    """Merge every group that one other group alone reads into that one."""
    for group in reversed(list(groups)):
        if group[0] not in group_of:
            continue
        readers = [r for r in _readers([u for n in group for u in n.users], group_of) if r is not group]
        if readers and readers[0] is not None and all(r is readers[0] for r in readers):
            _merge(group, readers[0], groups, group_of)


def _readers(users: list[fx.Node], group_of: dict[fx.Node, list[fx.Node]]) -> list[list[fx.Node] | None]:
    """The groups that read a value, through views; None for whatever is not fused."""
    found: list[list[fx.Node] | None] = []
    for user in users:
        if user in group_of:
            found.append(group_of[user])
        elif user.op == "call_function" and is_free(user):
            found += _readers(list(user.users), group_of)
        else:
            found.append(None)
    return found


def group_traffic(group: list[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """(read, written): the tensors that a kernel reads from memory, and those of its results that are used outside.

    A call that writes into (part of) a buffer writes the buffer, whatever the number of such calls.
    """
    inside = set(group)
    read: dict[fx.Node, None] = {}
    written: dict[fx.Node, None] = {}
    for node in group:
        in_place = is_in_place(node)
        for source in node.all_input_nodes[1:] if in_place else node.all_input_nodes:
            base = storage_of(source)
            if base not in inside:
                read[base] = None
        if in_place:
            written[storage_of(node)] = None
        elif any(_leaves(u, inside) for u in node.users) or not node.users:
            written[node] = None
    return list(read), list(written)


def only_inside(groups: list[list[fx.Node]]) -> set[fx.Node]:
    """Results that live in registers: no kernel writes them to memory."""
    return {node for group in groups for node in set(group) - set(group_traffic(group)[1])}


def _leaves(user: fx.Node, inside: set[fx.Node]) -> bool:
    """True if a value that `user` uses must be in memory: `user`, or what reads its view, is outside the kernel."""
    if user in inside:
        return False
    if user.op == "call_function" and is_free(user) and user.target not in HEAVY:
        return any(_leaves(u, inside) for u in user.users) if user.users else False
    return True
