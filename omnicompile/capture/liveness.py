"""What a segment keeps for its backward under each recompute policy, and its peak of temporaries, by liveness."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import sympy
from torch import Tensor, fx
from torch._ops import OpOverload

from omnicompile.capture.annotate import gradient_feeds
from omnicompile.capture.classify import ATTENTION, is_cheap, is_free, storage_of
from omnicompile.capture.fusion import fuse, only_inside
from omnicompile.capture.joint import JointGraph
from omnicompile.capture.symbols import SizeReader
from omnicompile.program import BackwardPoint, Expr, Recompute, Saved

ZERO = sympy.Integer(0)

POINTS = 3
"""Moments of a backward at most."""


@dataclass
class Liveness:
    """Results for one segment."""

    saved: dict[Recompute, Saved]
    forward_peak: Expr
    backward: tuple[BackwardPoint, ...]


@dataclass(frozen=True)
class _Sizes:
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


def _needed_by(joint: JointGraph, labels: frozenset[str]) -> dict[fx.Node, None]:
    """Storages made by the forward (or flowing in) that backward calls for these gradients read."""
    feeds = gradient_feeds(joint)
    kept = set(joint.forward) | joint.differentiable - set(joint.params)
    needed: dict[fx.Node, None] = {}
    for node in joint.backward:
        if feeds.get(node, frozenset()) & labels:
            for source in node.all_input_nodes:
                base = storage_of(source)
                if base in kept and isinstance(base.meta.get("val"), Tensor):
                    needed[base] = None
    return needed


def _selective(joint: JointGraph, needed: Iterable[fx.Node]) -> tuple[dict[fx.Node, None], set[fx.Node]]:
    """Replace what is cheap to compute by what it is computed from: (stored, recomputed)."""
    forward = set(joint.forward)
    stored: dict[fx.Node, None] = {}
    recomputed: set[fx.Node] = set()
    stack = list(needed)
    while stack:
        node = storage_of(stack.pop())
        if node in stored or node in recomputed or node in joint.params:
            continue
        if node in forward and is_cheap(_producer(node)):
            recomputed.add(node)
            stack.extend(node.all_input_nodes)
        elif node in forward or node in joint.differentiable:
            stored[node] = None
    return stored, recomputed


def _producer(node: fx.Node) -> fx.Node:
    """The call that computes a value: for an element of a tuple, the call that returned the tuple."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return node.args[0]
    return node


def _upstream(joint: JointGraph, needed: Iterable[fx.Node], kept: set[fx.Node]) -> set[fx.Node]:
    """Every forward call that the needed values come from, not looking behind what is kept."""
    forward = set(joint.forward) - kept
    found: set[fx.Node] = set()
    stack = list(needed)
    while stack:
        node = stack.pop()
        if node in forward and node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _attention_results(joint: JointGraph) -> set[fx.Node]:
    """Attention calls and, as they return tuples, the elements of their results."""
    return {node for node in joint.forward if _producer(node).target in ATTENTION}


def _policy(joint: JointGraph, sizes: _Sizes, policy: Recompute, labels: frozenset[str]) -> tuple[Expr, set[fx.Node]]:
    """(bytes kept, forward calls run again) for the gradients `labels`. A policy that would keep no less than a milder
    one does as that one."""
    needed = _needed_by(joint, labels)
    kept, again = sizes.total(needed), set[fx.Node]()
    if not needed:
        return kept, again
    for milder in Recompute:
        if milder is not Recompute.NONE:
            stored, recomputed = _choice(joint, milder, needed)
            if not sizes.larger(sizes.total(stored), kept):
                kept, again = sizes.total(stored), recomputed
        if milder is policy:
            break
    return kept, again


def _choice(
    joint: JointGraph, policy: Recompute, needed: dict[fx.Node, None]
) -> tuple[dict[fx.Node, None], set[fx.Node]]:
    """What `policy` stores and what it computes again."""
    if policy is Recompute.SELECTIVE:
        return _selective(joint, needed)
    inputs = joint.differentiable - set(joint.params)
    stored = dict.fromkeys(n for n in joint.activations if n in inputs)
    attention = _attention_results(joint) if policy is Recompute.EXCEPT_ATTENTION else set[fx.Node]()
    again = _upstream(joint, needed, attention)
    read = {storage_of(source) for node in again for source in node.all_input_nodes} | set(needed)
    stored |= dict.fromkeys(node for node in joint.forward if node in attention and node in read)
    return stored, again


def _last_uses(calls: list[fx.Node]) -> dict[fx.Node, int]:
    """Storage -> index of the last call that reads it."""
    return {storage_of(source): index for index, node in enumerate(calls) for source in node.all_input_nodes}


def _live(calls: list[fx.Node], skip: set[fx.Node]) -> Iterator[frozenset[fx.Node]]:
    """For each call the storages of results that live during it; not those in `skip`, nor what stays in registers."""
    skip = skip | only_inside(fuse(calls))
    last_use = _last_uses(calls)
    live: set[fx.Node] = set()
    for index, node in enumerate(calls):
        if not is_free(node) or node.target is operator.getitem:
            base = storage_of(node)
            if base is node and node not in skip and isinstance(node.meta.get("val"), Tensor):
                live.add(node)
        yield frozenset(live)
        for source in {storage_of(s) for s in node.all_input_nodes} | {node}:
            if last_use.get(source, index) <= index:
                live.discard(source)


@dataclass(frozen=True)
class _Corner:
    """A call of a backward: live results, saved storages that are no longer needed, elements of dense and of expert
    parameters that have gradients. x: bytes in this capture, live less freed. y: elements."""

    live: frozenset[fx.Node]
    freed: tuple[fx.Node, ...]
    made: tuple[float, float]
    x: float
    y: float


def _stretch_ends(calls: list[fx.Node]) -> list[int]:
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


def _forward_peak(joint: JointGraph, sizes: _Sizes, kept: set[fx.Node]) -> Expr:
    """The most bytes of results that live at a time, beyond what is `kept`."""
    number = sizes.numbers()
    most = max(_live(joint.forward, kept), key=lambda live: sum(map(number, live)), default=frozenset[fx.Node]())
    return sizes.total(most)


def _backward_points(
    joint: JointGraph, sizes: _Sizes, saved: Iterable[fx.Node], experts: Collection[str]
) -> tuple[BackwardPoint, ...]:
    """The corners of (bytes of activations, gradients): one of them holds the most, however large a byte of the one is
    beside a byte of the other on a rank. In order; the fewest gradients come first."""
    gradients = {storage_of(node): name for name, node in joint.weight_grads.items()}
    last_use, ends, number = _last_uses(joint.backward), _stretch_ends(joint.backward), sizes.numbers()
    held_until = {node: ends[last_use[node]] for node in saved if node not in sizes.shared and node in last_use}
    made = [0.0, 0.0]
    found: list[_Corner] = []
    for index, (node, live) in enumerate(zip(joint.backward, _live(joint.backward, set(gradients)))):
        if node in gradients:
            made[gradients[node] in experts] += node.meta["val"].numel()
        freed = tuple(node for node, end in held_until.items() if end < index)
        found.append(
            _Corner(live, freed, (made[0], made[1]), sum(map(number, live)) - sum(map(number, freed)), sum(made))
        )
    dense, expert = (total or 1.0 for total in made)
    return tuple(
        BackwardPoint(sizes.total(c.live), sizes.total(c.freed), c.made[0] / dense, c.made[1] / expert)
        for c in _corners(found)
    ) or (BackwardPoint(ZERO, ZERO),)


def _corners(found: list[_Corner]) -> list[_Corner]:
    """Those on the upper right of the convex hull, by rising y; of more than `POINTS` those that stand out least are
    left out."""
    hull: list[_Corner] = []
    for corner in sorted(found, key=lambda c: (-c.x, -c.y)):
        if hull and corner.y <= hull[-1].y:
            continue
        while len(hull) > 1 and _stands_out(hull[-2], hull[-1], corner) <= 0:
            hull.pop()
        hull.append(corner)
    while len(hull) > POINTS:
        del hull[min(range(1, len(hull) - 1), key=lambda i: _stands_out(*hull[i - 1 : i + 2]))]
    return hull


def _stands_out(a: _Corner, b: _Corner, c: _Corner) -> float:
    """Twice the area of the triangle; positive if b lies to the upper right of the line from a to c."""
    return (b.x - a.x) * (c.y - a.y) - (b.y - a.y) * (c.x - a.x)


def analyse(
    joint: JointGraph,
    reader: SizeReader,
    fused_names: dict[fx.Node, str],
    shared: Mapping[fx.Node, int],
    experts: Collection[str],
) -> Liveness:
    """fused_names: forward call -> name of the Op that it is part of. shared: values flowing in that other instances of
    the segment read too (the encoder's output in a decoder's layers) -> number of instances. experts: names of
    parameters of experts."""
    both, inputs_only = frozenset({"weight", "input"}), frozenset({"input"})
    sizes = _Sizes(reader, shared)
    saved = {}
    for policy in Recompute:
        nbytes, again = _policy(joint, sizes, policy, both)
        frozen, _ = _policy(joint, sizes, policy, inputs_only)
        names = dict.fromkeys(fused_names[n] for n in joint.forward if n in again and n in fused_names)
        saved[policy] = Saved(nbytes, frozen, tuple(names))
    needed = _needed_by(joint, both)
    return Liveness(
        saved=saved,
        forward_peak=_forward_peak(joint, sizes, set(needed) | {storage_of(o) for o in joint.outputs}),
        backward=_backward_points(joint, sizes, needed, experts),
    )
