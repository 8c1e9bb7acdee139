"""Recompute: values that the backward reads are computed again instead of being kept from the forward.

What is kept is what the planner prices (capture/liveness.py). Under `selective`: results of GEMMs, attention, experts
and collectives, and whatever is not cheap. Under `except_attention`: what flows into a layer, and results of attention.
Under `full`: what flows into a layer. A policy that would keep no less than a milder one does as that one.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from omnicompile.capture.classify import ATTENTION, is_cheap, is_in_place
from omnicompile.passes.liveness import Rows, balanced_rows, storage_of, storages_bytes
from omnicompile.passes.segments import RECOMPUTE, forward_layers, is_forward
from omnicompile.plan import BlockPlan
from omnicompile.recompute import Recompute
from omnicompile.torch_compat import OpOverload

PARAM_GATHER = "param_gather"
_SIZED_BY_DATA = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)


@dataclass(frozen=True)
class Recomputed:
    """What was done to one layer. kept: bytes from forward to backward, before and after. What flows in counts for the
    layer that reads it, but for what several layers read (rotary tables), which is kept in any case. again: nodes that
    run a second time."""

    layer: str
    policy: Recompute
    kept_before: int
    kept: int
    again: int


def recompute_pass(gm: fx.GraphModule, blocks: Mapping[str, BlockPlan]) -> list[Recomputed]:
    """Run layers again in their backward, as each block's plan says, in place. gm: a step graph with the marks of
    `segments`.

    Before (full): `a = f(x); b = g(a); ...; da = dg(a, db); dx = df(x, da)`.
    After: `a = f(x); b = g(a); ...; a2 = f(x); da = dg(a2, db); dx = df(x, da)`: `a` dies in the forward, and each copy
    stands right before its first use in the backward. Collectives inside are issued again by all ranks alike.

    Safe because a copy reads what the original read and gives the same bits. Kept in any case: results of operators
    that draw random numbers or write in place, sizes and what they come from, and choices (integers made from
    floating-point values, such as the experts of a token), so that a second run cannot choose otherwise. Whole
    parameters are left to the step graph's own second gather, which serves the copies too. Runs before it.
    """
    step = _Step.of(gm)
    done: list[Recomputed] = []
    again: set[fx.Node] = set()
    for layer, nodes in step.layers.items():
        policy = _policy_of(nodes, blocks)
        if policy is not Recompute.NONE:
            result, run_again = _choose(step, layer, nodes, policy)
            done.append(result)
            again |= run_again
    if again:
        _Copier(step, again).run()
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()
    return done


@dataclass(frozen=True)
class _Step:
    """A step graph cut in two. forward: its calls -> position. late: what comes after. layers: forward calls of each.
    mutated: storages that something writes into. shared: those made elsewhere that several layers read. rows: sizes
    known only at run time."""

    gm: fx.GraphModule
    forward: dict[fx.Node, int]
    late: list[fx.Node]
    layers: dict[str, list[fx.Node]]
    mutated: set[fx.Node]
    shared: set[fx.Node]
    rows: Rows

    @classmethod
    def of(cls, gm: fx.GraphModule) -> _Step:
        nodes = list(gm.graph.nodes)
        forward = {node: i for i, node in enumerate(nodes) if node.op == "call_function" and is_forward(node)}
        late = [node for node in nodes if node not in forward and node.op in ("call_function", "output")]
        mutated = {storage_of(node) for node in nodes if is_in_place(node)}
        layers = forward_layers(nodes)
        return cls(gm, forward, late, layers, mutated, _shared(layers), balanced_rows(gm.graph))


def _shared(layers: Mapping[str, list[fx.Node]]) -> set[fx.Node]:
    readers: Counter[fx.Node] = Counter()
    for nodes in layers.values():
        inside = set(nodes)
        readers.update({storage_of(s) for node in nodes for s in node.all_input_nodes if storage_of(s) not in inside})
    return {storage for storage, count in readers.items() if count > 1}


def _policy_of(nodes: list[fx.Node], blocks: Mapping[str, BlockPlan]) -> Recompute:
    """The policy of the block that most nodes of a layer belong to."""
    name = Counter(node.meta.get("block", "") for node in nodes).most_common(1)[0][0]
    return blocks[name].recompute if name in blocks else Recompute.NONE


# What may run again --------------------------------------------------------------------------------------------------


def _producer(node: fx.Node) -> fx.Node:
    """For an element of a tuple, the call that returned the tuple."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return node.args[0]
    return node


def _repeatable(step: _Step, node: fx.Node) -> bool:
    """Whether a second run gives the same bits and nothing else depends on its being the same tensor."""
    call, value = _producer(node), node.meta.get("val")
    values = value if isinstance(value, tuple | list) else (value,)
    if not values or not all(isinstance(v, Tensor) for v in values) or node.meta.get("role") == PARAM_GATHER:
        return False
    if not isinstance(call.target, OpOverload) or _draws(call):
        return False
    if any(storage_of(n) in step.mutated for n in (node, *node.all_input_nodes)):
        return False
    return not any(tag in call.target.tags for tag in _SIZED_BY_DATA) and not _chooses(node, call)


def _draws(node: fx.Node) -> bool:
    """Random numbers; an operator with a dropout probability of 0 draws none."""
    target = node.target
    if not isinstance(target, OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    for position, argument in enumerate(target._schema.arguments):
        if argument.name == "dropout_p":
            given = node.args[position] if position < len(node.args) else node.kwargs.get("dropout_p", 0.0)
            return given != 0.0
    return True


def _chooses(node: fx.Node, call: fx.Node) -> bool:
    """An integer made from floating-point values."""
    value = node.meta["val"]
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex() or value.dtype is torch.bool:
        return False
    sources = [source.meta.get("val") for source in call.all_input_nodes]
    return any(isinstance(v, Tensor) and v.is_floating_point() for v in sources)


def _candidates(step: _Step, nodes: list[fx.Node], policy: Recompute) -> set[fx.Node]:
    """Nodes of a layer that may run again: not what other layers read, under `selective` only what is cheap, and under
    `except_attention` all but attention. What shares memory with something kept, or is part of it, is kept too."""
    inside = set(nodes)
    kept = {
        storage_of(node)
        for node in nodes
        if not _repeatable(step, node) or any(user in step.forward and user not in inside for user in node.users)
    }
    if policy is Recompute.SELECTIVE:
        kept |= {storage_of(n) for n in nodes if storage_of(n) is n and not _is_light(_producer(n))}
    elif policy is Recompute.EXCEPT_ATTENTION:
        kept |= {storage_of(n) for n in nodes if _producer(n).target in ATTENTION}
    return {
        n for n in nodes if storage_of(n) not in kept and storage_of(_producer(n)) not in kept and _repeatable(step, n)
    }


def _is_light(node: fx.Node) -> bool:
    collective = isinstance(node.target, OpOverload) and node.target.namespace == "_c10d_functional"
    return not collective and is_cheap(node)


# What to keep --------------------------------------------------------------------------------------------------------


def _needed(step: _Step, nodes: list[fx.Node]) -> list[fx.Node]:
    """Values that the backward reads: of a layer, but for those that flow out, and those that flow into it."""
    inside = set(nodes)
    flowing = {source for node in nodes for source in node.all_input_nodes if source not in inside}
    own = [n for n in nodes if all(user in inside or user not in step.forward for user in n.users)]
    return [node for node in (*own, *flowing) if any(user not in step.forward for user in node.users)]


def _kept(step: _Step, needed: Iterable[fx.Node], again: set[fx.Node]) -> set[fx.Node]:
    """Memory that must last from forward to backward when `again` runs again, but for parameters and what is shared."""
    kept: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = list(needed)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in again:
            stack += node.all_input_nodes
        elif node in step.forward and node.meta.get("role") != PARAM_GATHER:
            kept.add(storage_of(node))
    return {n for n in kept - step.shared if n in step.forward and n.meta.get("role") != PARAM_GATHER}


def _choose(step: _Step, layer: str, nodes: list[fx.Node], policy: Recompute) -> tuple[Recomputed, set[fx.Node]]:
    needed = _needed(step, nodes)
    before = storages_bytes(_kept(step, needed, set()), step.rows)
    best, bytes_kept = set[fx.Node](), before
    order = list(Recompute)
    for candidate in order[order.index(Recompute.SELECTIVE) : order.index(policy) + 1]:
        again = _candidates(step, nodes, candidate)
        found = storages_bytes(_kept(step, needed, again), step.rows)
        if found < bytes_kept:
            best, bytes_kept = again, found
    return Recomputed(layer, policy, before, bytes_kept, len(best)), best


# Copies --------------------------------------------------------------------------------------------------------------


class _Copier:
    """Gives the backward its own copy of every node in `again` that it reads, right before the first use."""

    def __init__(self, step: _Step, again: set[fx.Node]) -> None:
        self.step, self.again = step, again
        self.copies: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        for node in self.step.late:
            for source in node.all_input_nodes:
                if source in self.again:
                    node.replace_input_with(source, self._copy(source, node))

    def _copy(self, wanted: fx.Node, before: fx.Node) -> fx.Node:
        if wanted not in self.copies:
            cone, stack = set[fx.Node](), [wanted]
            while stack:
                node = stack.pop()
                if node in self.again and node not in cone and node not in self.copies:
                    cone.add(node)
                    stack += node.all_input_nodes
            with self.step.gm.graph.inserting_before(before):
                for node in sorted(cone, key=self.step.forward.__getitem__):
                    self._emit(node)
        return self.copies[wanted]

    def _emit(self, node: fx.Node) -> None:
        copy = self.step.gm.graph.node_copy(node, lambda x: self.copies.get(x, x))
        copy.meta = {**node.meta, "phase": RECOMPUTE}
        self.copies[node] = copy
