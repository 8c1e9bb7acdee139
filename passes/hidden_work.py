"""Products that nothing waits for are moved into time in which the compute stream would stand still."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from omnicompile.capture.classify import HEAVY, is_view
from omnicompile.passes.liveness import storage_of, tensor_bytes
from omnicompile.passes.segments import layer_of

if TYPE_CHECKING:
    from omnicompile.passes.async_ulysses import Clock

_c10d = torch.ops._c10d_functional
_EXCHANGE = _c10d.all_to_all_single.default
_WAIT = _c10d.wait_tensor.default
_REACH = 8  # products back
_WORTH = 5e-6  # seconds


@dataclass(frozen=True)
class Filled:
    """order: the new one. moved: products that were put elsewhere."""

    order: list[fx.Node]
    moved: int


@dataclass
class _Flight:
    """An exchange on its way from position `start` to `end` of the order, with `slack` seconds to spare at its end."""

    start: int
    end: int
    slack: float


@dataclass
class _Product:
    """until: position by which it must have run."""

    node: fx.Node
    place: int
    seconds: float
    until: int


def fill_waits(
    order: list[fx.Node], gradients: Sequence[str], clock: Clock, held: float, rows: Mapping[Any, int]
) -> Filled:
    """A new order in which products that no exchange depends on stand right before waits that would stand still.

    Before: `da = x.t() @ dy; E = exchange(e); e2 = wait(E)`. After: `E = exchange(e); da = x.t() @ dy; e2 = wait(E)`.

    The nearest product before the launch is taken first, and as many as fill the time. Not one that hides another
    exchange, nor one whose layer would have its last gradient later; and no more than `held` bytes are kept longer for
    one wait. What is computed of a product (its cast and the collective that follows) goes with it. gradients:
    placeholders of the parameters whose gradients follow the loss in the output. Safe: a product is only moved back,
    with all that reads it.
    """
    return _Fill(order, gradients, clock, held, rows).run() if held > 0 else Filled(order, 0)


@dataclass
class _Fill:
    order: list[fx.Node]
    gradients: Sequence[str]
    clock: Clock
    held: float
    rows: Mapping[Any, int]
    flights: list[_Flight] = field(default_factory=list)
    products: list[_Product] = field(default_factory=list)

    def run(self) -> Filled:
        self.place = {node: i for i, node in enumerate(self.order)}
        self.last_use = self._last_uses()
        needed = self._needed()
        ends_by = self._ends_by(needed)
        before: dict[fx.Node, list[fx.Node]] = {}
        ends: dict[fx.Node, float] = {}
        free: dict[str, float] = {}
        now = 0.0
        for i, node in enumerate(self.order):
            if node.target is _EXCHANGE:
                channel, seconds = self.clock.exchange_seconds(node)
                free[channel] = ends[node] = max(now, free.get(channel, 0.0)) + seconds
            elif node.target is _WAIT and node.all_input_nodes[0] in ends:
                launch = node.all_input_nodes[0]
                chosen = self._choose(self.place[launch], i, ends[launch] - now)
                if chosen:
                    before[node] = [product.node for product in chosen]
                    saved = sum(product.seconds for product in chosen)
                    channel = self.clock.exchange_seconds(launch)[0]
                    ends[launch] -= saved
                    free[channel] -= saved
                now = max(now, ends[launch])
                self.flights.append(_Flight(self.place[launch], i, now - ends[launch]))
            elif node.target in HEAVY:
                seconds = self.clock.compute_seconds(node)
                now += seconds
                if node not in needed:
                    self.products.append(_Product(node, i, seconds, ends_by.get(node, i)))
        return Filled(self._moved(before), sum(map(len, before.values())))

    def _needed(self) -> set[fx.Node]:
        """What exchanges depend on, and what the step's first result, the loss, does."""
        output = self.order[-1]
        results = output.args[0]
        assert isinstance(results, tuple | list)
        stack = [n for n in self.order if n.target is _EXCHANGE] + [r for r in results[:1] if isinstance(r, fx.Node)]
        found = set(stack)
        while stack:
            for source in stack.pop().all_input_nodes:
                if source not in found:
                    found.add(source)
                    stack.append(source)
        return found

    def _ends_by(self, needed: set[fx.Node]) -> dict[fx.Node, int]:
        """Of every product that a gradient is made of: the position of the last such product of its layer."""
        layers = {node.name: _layer_of_first_use(node) for node in self.order if node.op == "placeholder"}
        results = self.order[-1].args[0]
        assert isinstance(results, tuple | list)
        layer: dict[fx.Node, str] = {}
        for name, result in zip(self.gradients, results[1:]):
            stack = [result] if isinstance(result, fx.Node) else []
            while stack:
                node = stack.pop()
                if node not in needed and node not in layer:
                    layer[node] = layers.get(name, "")
                    stack += node.all_input_nodes
        last: dict[str, int] = {}
        for node, name in layer.items():
            if node.target in HEAVY:
                last[name] = max(last.get(name, 0), self.place[node])
        return {node: last[name] for node, name in layer.items() if name and name in last}

    def _last_uses(self) -> dict[fx.Node, int]:
        last: dict[fx.Node, int] = {}
        for i, node in enumerate(self.order):
            for source in node.all_input_nodes:
                last[storage_of(source)] = i
        return last

    def _choose(self, launch: int, wait: int, idle: float) -> list[_Product]:
        """Products to put before the wait at position `wait`, where `idle` seconds would pass."""
        chosen: list[_Product] = []
        left = self.held
        for product in self.products[: -_REACH - 1 : -1]:
            if idle < _WORTH:
                break
            kept = self._keeps(product, wait)
            if product.place < launch and wait < product.until and kept <= left and self._spare(product):
                chosen.append(product)
                idle -= product.seconds
                left -= kept
        for product in chosen:
            self.products.remove(product)
        return chosen[::-1]

    def _keeps(self, product: _Product, until: int) -> int:
        """Bytes that live longer if a product runs at position `until`."""
        owners = {storage_of(source) for source in product.node.all_input_nodes}
        dying = (owner for owner in owners if owner.op == "call_function" and self.last_use[owner] < until)
        return sum(tensor_bytes(owner.meta.get("val"), self.rows) for owner in dying)

    def _spare(self, product: _Product) -> bool:
        """Whether every exchange that the product runs beside is hidden without it; takes the time from them."""
        beside = [flight for flight in self.flights[-64:] if flight.start < product.place < flight.end]
        if any(flight.slack < product.seconds for flight in beside):
            return False
        for flight in beside:
            flight.slack -= product.seconds
        return True

    def _moved(self, before: Mapping[fx.Node, list[fx.Node]]) -> list[fx.Node]:
        """The order with each product, what it alone reads through views, and what reads it, before its wait."""
        target: dict[fx.Node, int] = {}
        for wait, products in before.items():
            for product in products:
                self._take(product, self.place[wait], target)
        keys = {node: (i, 1, i) for node, i in self.place.items()}
        keys |= {node: (place, 0, self.place[node]) for node, place in target.items()}
        return sorted(self.order, key=keys.__getitem__)

    def _take(self, product: fx.Node, place: int, target: dict[fx.Node, int]) -> None:
        stack = [product]
        while stack:
            node = stack.pop()
            if node.op == "output" or self.place[node] >= place or target.get(node, -1) >= place:
                continue
            target[node] = place
            stack += node.users
        for source in product.all_input_nodes:
            if is_view(source) and all(user in target for user in source.users):
                target[source] = min(target[user] for user in source.users)


def _layer_of_first_use(node: fx.Node) -> str:
    while node.users and not node.meta.get("nn_module_stack"):
        node = next(iter(node.users))
    return layer_of(node)
