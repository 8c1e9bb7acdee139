"""Group element-wise and reduction work into the kernels that Inductor makes of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor, fx

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


def with_siblings(nodes: list[fx.Node], groups: list[list[fx.Node]]) -> list[list[fx.Node]]:
    """Groups of `fuse`, those made one that read the same tensor, as large as what they make, when equally many
    unfusible operators precede them: Inductor runs these together, so that what they read is there until all of their
    results are."""
    depth = _depths(nodes)
    found: dict[tuple[int, fx.Node], list[fx.Node]] = {}
    merged: list[list[fx.Node]] = []
    for group in groups:
        level, size = max(depth[node] for node in group), _largest(group)
        keys = [(level, base) for base in group_traffic(group)[0] if size and elements(base) == size]
        beside = next((found[key] for key in keys if key in found), None) if is_fusible(group[0]) else None
        if beside is None:
            beside = []
            merged.append(beside)
        beside += group
        if is_fusible(group[0]):
            found |= dict.fromkeys(keys, beside)
    return merged


def _largest(group: list[fx.Node]) -> int:
    """Elements of the largest result; 0 if that is not known."""
    sizes = [elements(node) for node in group]
    return max((size for size in sizes if isinstance(size, int)), default=0) if None not in sizes else 0


def elements(node: fx.Node) -> object:
    """Number of elements of a result, an expression where sizes are symbols."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    return math.prod(size if isinstance(size, int) else size.node.expr for size in value.shape)


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


def in_one_piece(nodes: Iterable[fx.Node], groups: Iterable[Sequence[fx.Node]]) -> list[fx.Node]:
    """`nodes` in an order in which each group stands together: where its last node is, or before the first node outside
    of it that reads one of its results. What a group reads comes before it."""
    return _InOnePiece(list(nodes), groups).order()


class _InOnePiece:
    """A *unit* is a group, or a node that is in none."""

    def __init__(self, nodes: list[fx.Node], groups: Iterable[Sequence[fx.Node]]) -> None:
        self._nodes = nodes
        self._unit = {node: (node,) for node in nodes} | {node: tuple(group) for group in groups for node in group}
        position = {node: index for index, node in enumerate(nodes)}
        self._first = {unit: min(position[node] for node in unit) for unit in set(self._unit.values())}
        self._last = {unit: max(position[node] for node in unit) for unit in set(self._unit.values())}
        self._done: set[fx.Node] = set()
        self._order: list[fx.Node] = []

    def order(self) -> list[fx.Node]:
        waiting: list[fx.Node] = []
        for index, node in enumerate(self._nodes):
            if self._last[self._unit[node]] > index:
                continue
            base = storage_of(node)
            if base is not node and is_free(node) and base in self._unit and base not in self._done:
                waiting.append(node)  # a view of what is yet to be made
            else:
                self._place(self._unit[node])
        for node in waiting:
            self._place(self._unit[node])
        return self._order

    def _place(self, unit: tuple[fx.Node, ...]) -> None:
        """Put a unit next, after what it reads."""
        stack, entered = [unit], set[tuple[fx.Node, ...]]()
        while stack:
            top = stack[-1]
            if top[0] in self._done:
                stack.pop()
                continue
            before = [] if top in entered else self._missing(top)
            entered.add(top)
            if before:
                stack += before
            else:
                self._order += top
                self._done.update(top)
                stack.pop()

    def _missing(self, unit: tuple[fx.Node, ...]) -> list[tuple[fx.Node, ...]]:
        read = (source for node in unit for source in node.all_input_nodes if source in self._unit)
        units = {self._unit[source] for source in read if source not in self._done} - {unit}
        return sorted(units, key=lambda unit: -self._first[unit])  # the earliest is placed first
