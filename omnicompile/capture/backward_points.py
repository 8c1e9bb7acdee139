"""The moments of a segment's backward at which it may hold the most, under each recompute policy."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import sympy
from torch import Tensor, fx
from torch._ops import OpOverload

from omnicompile.capture.classify import MATMULS, is_free, storage_of
from omnicompile.capture.fusion import fuse, in_one_piece, only_inside, with_siblings
from omnicompile.capture.joint import JointGraph
from omnicompile.capture.rerun import rerun
from omnicompile.capture.symbols import SizeReader
from omnicompile.program import BackwardPoint, Expr, Held, Recompute

ZERO = sympy.Integer(0)

POINTS = 3
"""Moments of a backward at most."""


@dataclass(frozen=True)
class Sizes:
    """Bytes per instance of a segment. shared: tensors that all instances read, to how many these are."""

    reader: SizeReader
    shared: Mapping[fx.Node, int]

    def total(self, nodes: Iterable[fx.Node]) -> Expr:
        return sum((self.reader.nbytes(n.meta.get("val")) / self.shared.get(n, 1) for n in nodes), ZERO)

    def numbers(self) -> Callable[[fx.Node], float]:
        """Bytes in this capture of a node's result, per instance."""
        found: dict[fx.Node, float] = {}

        def number(node: fx.Node) -> float:
            if node not in found:
                found[node] = self.reader.magnitude(self.total([node]))
            return found[node]

        return number

    def larger(self, left: Expr, right: Expr) -> bool:
        return self.reader.magnitude(left) >= self.reader.magnitude(right)


def last_uses(calls: Sequence[fx.Node], kernel_end: Mapping[fx.Node, int]) -> dict[fx.Node, int]:
    """Storage -> index of the last call that reads it. A kernel reads what any of its calls reads until it ends."""
    last: dict[fx.Node, int] = {}
    for index, node in enumerate(calls):
        for source in node.all_input_nodes:
            base = storage_of(source)
            last[base] = max(last.get(base, 0), kernel_end.get(node, index))
    return last


def kernel_ends(calls: Sequence[fx.Node], groups: Iterable[Sequence[fx.Node]]) -> dict[fx.Node, int]:
    """Call -> index of the last call of its kernel."""
    position = {node: index for index, node in enumerate(calls)}
    ends = ((group, max(position[node] for node in group)) for group in groups)
    return {node: end for group, end in ends for node in group}


def stretch_ends(calls: Sequence[fx.Node]) -> list[int]:
    """For each call the last one of the stretch that is compiled with it: what goes into compiled code is held until it
    returns. Custom operators (attention, experts) are on their own."""
    ends: list[int] = []
    end = len(calls) - 1
    for index in range(len(calls) - 1, -1, -1):
        target = calls[index].target
        own = isinstance(target, OpOverload) and target.namespace not in ("aten", "prims")
        ends.append(index if own else end)
        end = index - 1 if own else end
    return ends[::-1]


def launches_end(calls: Sequence[fx.Node], ends: Sequence[int], gradients: Collection[fx.Node]) -> list[int]:
    """`ends`, but a stretch ends after the first of `gradients` and the products beside it: there the collectives of
    the layers before and after are launched."""
    at = next((index for index, node in enumerate(calls) if node in gradients), None)
    if at is None:
        return list(ends)
    while at < ends[at] and (is_free(calls[at + 1]) or calls[at + 1].target in MATMULS):
        at += 1
    return [at if index <= at <= end else end for index, end in enumerate(ends)]


@dataclass(frozen=True)
class Kernels:
    """calls: those of a kernel together. ends, stretch_ends: call -> index of the last one of its kernel, and of its
    stretch of compiled code; a kernel lies within a stretch. registers: results that are never in memory."""

    calls: list[fx.Node]
    ends: dict[fx.Node, int]
    stretch_ends: dict[fx.Node, int]
    registers: set[fx.Node]


def by_kernels(calls: Sequence[fx.Node], gradients: Collection[fx.Node] = ()) -> Kernels:
    """How `calls` run when they are compiled. gradients: see `launches_end`."""
    stretches: dict[int, list[fx.Node]] = {}
    for node, end in zip(calls, launches_end(calls, stretch_ends(calls), gradients)):
        stretches.setdefault(end, []).append(node)
    groups = [group for nodes in stretches.values() for group in with_siblings(nodes, fuse(nodes))]
    order = in_one_piece(calls, groups)
    return Kernels(order, kernel_ends(order, groups), kernel_ends(order, stretches.values()), only_inside(groups))


def live(
    calls: Sequence[fx.Node], ends: Mapping[fx.Node, int], skip: Collection[fx.Node]
) -> Iterator[frozenset[fx.Node]]:
    """For each call the storages of results that live during it, until the call in `ends`; not those in `skip`."""
    dying: dict[int, list[fx.Node]] = {}
    alive: set[fx.Node] = set()
    for index, node in enumerate(calls):
        if not is_free(node) or node.target is operator.getitem:
            base = storage_of(node)
            if base is node and node not in skip and isinstance(node.meta.get("val"), Tensor):
                alive.add(node)
                dying.setdefault(max(index, ends.get(node, index)), []).append(node)
        yield frozenset(alive)
        alive.difference_update(dying.pop(index, ()))


@dataclass(frozen=True)
class Corner:
    """A call of a backward: live results, what is gone of all that the backward reads of the forward, elements of
    dense and of expert parameters that have gradients. x: bytes in this capture, live less gone. y: elements."""

    live: frozenset[fx.Node]
    gone: tuple[fx.Node, ...]
    made: tuple[float, float]
    x: float
    y: float


class _Walk:
    """The calls of a backward under a policy, kernel by kernel, and what lives during each. again: forward calls that
    run again in it."""

    def __init__(self, joint: JointGraph, again: Collection[fx.Node]) -> None:
        self._origin, calls = rerun(joint, again)
        self.copies = {origin: copy for copy, origin in self._origin.items()}
        weights = {storage_of(node) for node in joint.weight_grads.values()}
        gradients = {self.copies[node] for node in weights if node in self.copies}
        self._kernels = by_kernels(calls, gradients)
        self.ends = self._ends()

    def calls(self, skip: Iterable[fx.Node]) -> Iterator[tuple[int, fx.Node, frozenset[fx.Node]]]:
        """(index, call, results that live during it), by nodes of the joint graph; not those in `skip`."""
        left_out = self._kernels.registers | {self.copies[node] for node in skip if node in self.copies}
        for index, alive in enumerate(live(self._kernels.calls, self.ends, left_out)):
            yield index, self._origin[self._kernels.calls[index]], frozenset(self._origin[copy] for copy in alive)

    def _ends(self) -> dict[fx.Node, int]:
        """Call until which a storage is held. What goes into compiled code, which holds it until it returns, is what
        comes from the forward and what is made in an earlier stretch, again or before the layer's launches."""
        calls, stretch = self._kernels.calls, self._kernels.stretch_ends
        made = set(calls)
        ends = last_uses(calls, self._kernels.ends)
        for node, index in ends.items():
            end = stretch[calls[index]]
            if node not in made or stretch[node] != end:
                ends[node] = end
        return ends


def _corners_of(
    joint: JointGraph, sizes: Sizes, needed: Collection[fx.Node], again: Collection[fx.Node], experts: Collection[str]
) -> list[Corner]:
    """One for each call of the backward under a policy."""
    gradients = {storage_of(node): name for name, node in joint.weight_grads.items()}
    walk, number = _Walk(joint, again), sizes.numbers()
    counted = [node for node in needed if node not in sizes.shared and node in walk.copies]
    kept_until = {node: walk.ends.get(walk.copies[node], 0) for node in counted if node not in again}
    made = [0.0, 0.0]
    corners: list[Corner] = []
    for index, node, alive in walk.calls(gradients):
        if node in gradients:
            made[gradients[node] in experts] += node.meta["val"].numel()
        gone = tuple(n for n in counted if (n not in alive if n in again else kept_until[n] < index))
        here = alive.difference(counted)
        x = sum(map(number, here)) - sum(map(number, gone))
        corners.append(Corner(here, gone, (made[0], made[1]), x, sum(made)))
    return corners


def backward_points(
    joint: JointGraph,
    sizes: Sizes,
    needed: Collection[fx.Node],
    again: Mapping[Recompute, Collection[fx.Node]],
    experts: Collection[str],
) -> tuple[BackwardPoint, ...]:
    """The corners of (bytes of activations, gradients) when nothing runs again: one of them holds the most, however
    large a byte of the one is beside a byte of the other on a rank. In order; the fewest gradients come first. Under
    the other policies, what a point holds is the most of all calls since the point before.

    needed: of the forward, what the backward reads. again: forward calls that run again, by policy. experts: names of
    parameters of experts.
    """
    whole = _corners_of(joint, sizes, needed, (), experts)
    points = corners(whole)
    if not points:
        return (BackwardPoint(ZERO, ZERO),)
    dense, expert = (total or 1.0 for total in whole[-1].made)
    under = {
        policy: _held(_corners_of(joint, sizes, needed, calls, experts), points, sizes)
        for policy, calls in again.items()
        if calls
    }
    return tuple(
        BackwardPoint(
            sizes.total(c.live),
            sizes.total(c.gone),
            c.made[0] / dense,
            c.made[1] / expert,
            {policy: held[i] for policy, held in under.items()},
        )
        for i, c in enumerate(points)
    )


def _held(found: Sequence[Corner], points: Sequence[Corner], sizes: Sizes) -> list[Held]:
    """For each of `points` the most that is held since the one before; after the last one, to the end."""
    held: list[Held] = []
    start = -1.0
    for i, point in enumerate(points):
        end = point.y if i + 1 < len(points) else float("inf")
        most = max((c for c in found if start < c.y <= end), key=lambda c: c.x)
        held.append(Held(sizes.total(most.live), sizes.total(most.gone)))
        start = end
    return held


def corners(found: Sequence[Corner]) -> list[Corner]:
    """Those on the upper right of the convex hull, by rising y; of more than `POINTS` those that stand out least are
    left out."""
    hull: list[Corner] = []
    for corner in sorted(found, key=lambda c: (-c.x, -c.y)):
        if hull and corner.y <= hull[-1].y:
            continue
        while len(hull) > 1 and _stands_out(hull[-2], hull[-1], corner) <= 0:
            hull.pop()
        hull.append(corner)
    while len(hull) > POINTS:
        del hull[min(range(1, len(hull) - 1), key=lambda i: _stands_out(*hull[i - 1 : i + 2]))]
    return hull


def _stands_out(a: Corner, b: Corner, c: Corner) -> float:
    """Twice the area of the triangle; positive if b lies to the upper right of the line from a to c."""
    return (b.x - a.x) * (c.y - a.y) - (b.y - a.y) * (c.x - a.x)
