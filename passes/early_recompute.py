"""What is computed again and exchanged starts before the products that hide the exchange."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import fx

from omnicompile.capture.classify import HEAVY
from omnicompile.passes.segments import RECOMPUTE, is_forward

if TYPE_CHECKING:
    from omnicompile.passes.async_ulysses import Clock

_EXCHANGE = torch.ops._c10d_functional.all_to_all_single.default
_GATHER_AGAIN = "gather again"


def recompute_ahead(nodes: Sequence[fx.Node], clock: Clock) -> list[fx.Node]:
    """The nodes of a step graph in an order in which exchanges of recomputed values are launched early.

    Before: `dm = ..; da = dm @ w.t(); DA = exchange(da); q2 = x @ a; Q = exchange(q2); o = attention_backward(wait(DA),
    wait(Q))`. After: `dm = ..; q2 = x @ a; Q = exchange(q2); da = dm @ w.t(); DA = exchange(da);
    o = attention_backward(wait(DA), wait(Q))`.

    A layer's copies that lead to an exchange move, with the exchange, in front of as many products of the backward as
    take that long; not those of the first layer to have its backward, which follows the loss's, where memory is short.
    Safe: they read what the forward kept, parameters, and each other; none goes before what it reads.
    """
    order = list(nodes)
    place = {node: i for i, node in enumerate(order)}
    moved: dict[fx.Node, int] = {}
    for group in _groups(order)[1:]:
        cone = _cone(group)
        if (target := _target(order, place, cone, group, clock)) is None:
            continue
        moved |= dict.fromkeys((node for node in cone if place[node] > target), target)
    keys = {node: (moved.get(node, i), node not in moved, i) for i, node in enumerate(order)}
    return sorted(order, key=keys.__getitem__)


def _groups(order: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """Exchanges of recomputed values between which no product of the backward stands."""
    groups: list[list[fx.Node]] = []
    new = True
    for node in order:
        again = node.meta.get("phase") == RECOMPUTE
        if node.target is _EXCHANGE and again:
            if new:
                groups.append([])
            groups[-1].append(node)
            new = False
        elif node.target in HEAVY and not again:
            new = True
    return groups


def _cone(group: Sequence[fx.Node]) -> set[fx.Node]:
    """The exchanges and the copies and gathers that lead to them."""
    found, stack = set(group), list(group)
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in found and source.meta.get("phase") in (RECOMPUTE, _GATHER_AGAIN):
                found.add(source)
                stack.append(source)
    return found


def _target(
    order: Sequence[fx.Node], place: Mapping[fx.Node, int], cone: set[fx.Node], group: Sequence[fx.Node], clock: Clock
) -> int | None:
    """Position of the product in front of which the cone goes; None where it stays, if there is none to pass."""
    wanted = sum(clock.exchange_seconds(node)[1] for node in group)
    read = (source for node in cone for source in node.all_input_nodes if source not in cone)
    earliest = max((place[source] for source in read), default=-1)
    found: int | None = None
    for i in range(min(place[node] for node in cone) - 1, earliest, -1):
        node = order[i]
        if wanted <= 0 or is_forward(node) or node.op != "call_function":
            break
        if node.target in HEAVY:
            wanted -= clock.compute_seconds(node)
            found = i
    return found
