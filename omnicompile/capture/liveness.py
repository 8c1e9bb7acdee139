"""What a segment keeps for its backward under each recompute policy, and its peak of temporaries, by liveness."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from omnicompile.capture.annotate import gradient_feeds
from omnicompile.capture.backward_points import Sizes, backward_points, by_kernels, last_uses, live
from omnicompile.capture.classify import ATTENTION, is_cheap, storage_of
from omnicompile.capture.joint import JointGraph
from omnicompile.capture.symbols import SizeReader
from omnicompile.program import BackwardPoint, Expr, Recompute, Saved


@dataclass
class Liveness:
    """Results for one segment."""

    saved: dict[Recompute, Saved]
    forward_peak: Expr
    backward: tuple[BackwardPoint, ...]


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


def _policy(joint: JointGraph, sizes: Sizes, policy: Recompute, labels: frozenset[str]) -> tuple[Expr, set[fx.Node]]:
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


def _forward_peak(joint: JointGraph, sizes: Sizes, kept: set[fx.Node]) -> Expr:
    """The most bytes of results that live at a time, beyond what is `kept`."""
    number = sizes.numbers()
    kernels = by_kernels(joint.forward)
    moments = live(kernels.calls, last_uses(kernels.calls, kernels.ends), kept | kernels.registers)
    return sizes.total(max(moments, key=lambda alive: sum(map(number, alive)), default=frozenset[fx.Node]()))


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
    sizes = Sizes(reader, shared)
    saved, runs_again = {}, {}
    for policy in Recompute:
        nbytes, again = _policy(joint, sizes, policy, both)
        frozen, _ = _policy(joint, sizes, policy, inputs_only)
        runs_again[policy] = again
        names = dict.fromkeys(fused_names[n] for n in joint.forward if n in again and n in fused_names)
        saved[policy] = Saved(nbytes, frozen, tuple(names))
    needed = _needed_by(joint, both)
    return Liveness(
        saved=saved,
        forward_peak=_forward_peak(joint, sizes, set(needed) | {storage_of(o) for o in joint.outputs}),
        backward=backward_points(joint, sizes, needed, runs_again, experts),
    )
