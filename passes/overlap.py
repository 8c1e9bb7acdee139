"""Parameters are gathered one layer ahead and gradients scattered one layer behind, each layer's in one collective.

On the step graph of one rank. A *unit* is what is gathered together: the parameters of a layer, or of what lies between
two stacks of layers. Only the order of operators and the packing of collectives change, so results keep their bits.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from omnicompile.capture.classify import ATTENTION, GROUPED, MATMULS, is_free, is_fusible
from omnicompile.passes.liveness import Rows, balanced_rows, elements, launch_of, storages_bytes, tensor_bytes
from omnicompile.passes.segments import is_forward, layer_of

PARAM_GATHER = "param_gather"
_c10d = torch.ops._c10d_functional
_GATHER = _c10d.all_gather_into_tensor.default
_SCATTER = _c10d.reduce_scatter_tensor.default
_WAIT = _c10d.wait_tensor.default
_TOGETHER = {
    _GATHER: _c10d.all_gather_into_tensor_coalesced.default,
    _SCATTER: _c10d.reduce_scatter_tensor_coalesced.default,
}

Place = tuple[int, int, int]

_SMALL = 0.1
"""Bytes of gradients that are not waited for, as a part of the largest unit's."""


@dataclass(frozen=True)
class Overlapped:
    """Units whose parameters are gathered (again for the backward) and whose gradients are scattered, and the number of
    collectives before and after."""

    gathers: int
    scatters: int
    collectives_before: int
    collectives: int


@dataclass
class _Unit:
    """Collectives that are launched together. key: block and layer. place: of the first use (of gathers), of the last
    gradient (of scatters)."""

    key: tuple[str, str]
    place: int
    launches: list[fx.Node] = field(default_factory=list)


def one_channel(collective: fx.Node) -> str:
    """Where nothing is known of the links that collectives run on."""
    return ""


def overlap_pass(
    gm: fx.GraphModule,
    gradients: Sequence[str],
    prefetch: int = 1,
    channel: Callable[[fx.Node], str] = one_channel,
) -> Overlapped:
    """Reorder a step graph in place. gradients: placeholders of the parameters whose gradients follow the loss in the
    output. prefetch: units ahead of use at which parameters are gathered. channel: of a collective; those of one
    channel run one after the other.

    Before (layers 1 and 2, two parameters each):
        a1, b1 = wait(gather(p1)), wait(gather(q1)); y = f(x, a1, b1); a2, b2 = ...; z = f(y, a2, b2)
        dy, da2 = df(z, a2, b2); ga2 = wait(scatter(da2)); ...; dx, da1 = df(y, a1, b1); ga1 = wait(scatter(da1))
    After:
        A1 = gather(p1, q1); a1, b1 = wait(A1); A2 = gather(p2, q2); y = f(x, a1, b1); a2, b2 = wait(A2); ...
        dy, da2 = df(z, a2, b2); G2 = scatter(da2, ...); dx, da1 = df(y, a1, b1); ga2 = wait(G2); G1 = scatter(da1, ...)

    - The gather of a unit is launched while the unit `prefetch` before it computes, before the longest stretch of
      compute between that unit's collectives on the same channel (all-to-alls around attention or experts), so as not
      to stand in their way; at its beginning where there are none. It is waited for before the unit's first use, or
      before the element-wise work that leads to it, so as not to cut a kernel. At most `prefetch` + 1 units' parameters
      are whole at a time.
    - The gradients of a unit are cast to the dtype they are reduced in, and scattered, when the last of them is there
      (and the kernel that it comes of has ended); they are waited for when a later unit's need the room, or at the end.
      A gradient that was ready to be computed more than a unit earlier is computed then: that of an embedding,
      which autograd leaves to the end.
    - Collectives of a unit over the same group become one coalesced call: one launch, no copies in or out, and each
      tensor is reduced as it would be alone.

    Safe: gathers depend only on placeholders, which a step graph does not write; scattered gradients are read by
    nothing but the output; all ranks run the same graph. Runs after the backward has its own gathers.
    """
    return _Overlap(gm, gradients, prefetch, channel).run()


def last_unit(gm: fx.GraphModule) -> set[str]:
    """Placeholders of the parameters that the forward gathers last: their backward comes right after, so they stay
    whole."""
    units = _gather_units(gm.graph, _indices(gm.graph), is_forward)
    return {str(node.meta.get("param")) for node in units[-1].launches} if units else set()


def _indices(graph: fx.Graph) -> dict[fx.Node, int]:
    return {node: i for i, node in enumerate(graph.nodes)}


def _is_parameter_gather(node: fx.Node) -> bool:
    return node.target is _GATHER and node.meta.get("role") == PARAM_GATHER and len(node.users) == 1


def _gather_units(graph: fx.Graph, index: Mapping[fx.Node, int], wanted: Callable[[fx.Node], bool]) -> list[_Unit]:
    """Neighbouring gathers of one layer and block."""
    units: list[_Unit] = []
    for node in graph.nodes:
        if _is_parameter_gather(node) and wanted(node):
            key = (str(node.meta.get("block", "")), layer_of(node))
            if not units or units[-1].key != key:
                units.append(_Unit(key, index[node]))
            units[-1].launches.append(node)
    return units


def inputs_chain(node: fx.Node) -> list[fx.Node]:
    """What lies between a placeholder and a collective's input (a cast, views), in order; the placeholder not."""
    chain: list[fx.Node] = []
    source = node.args[0]
    while isinstance(source, fx.Node) and source.op != "placeholder" and len(source.all_input_nodes) == 1:
        chain.append(source)
        source = source.args[0]
    return chain[::-1]


class _Overlap:
    """places: where moved nodes go: index of the node that they stand before or after, then order there."""

    def __init__(
        self, gm: fx.GraphModule, gradients: Sequence[str], prefetch: int, channel: Callable[[fx.Node], str]
    ) -> None:
        self.prefetch, self.channel = prefetch, channel
        self.gm, self.graph, self.gradients = gm, gm.graph, gradients
        self.index = _indices(gm.graph)
        self.nodes = list(gm.graph.nodes)
        self.rows = balanced_rows(gm.graph)
        own = [node for node in self.nodes if _is_parameter_gather(node)]
        self.names = self._parameters_of_scatters()
        self.own_waits = {user for node in (*own, *self.names) for user in node.users}
        self.moving = {*own, *self.names, *self.own_waits}
        self.places: dict[fx.Node, Place] = {}
        self.moved = 0
        self.made = 0

    def run(self) -> Overlapped:
        gathers = _gather_units(self.graph, self.index, is_forward)
        gathers += _gather_units(self.graph, self.index, lambda node: not is_forward(node))
        scatters = self._scatter_units()
        for unit in gathers:
            unit.place = self._kernel_start(unit.place)
        gathers.sort(key=lambda unit: unit.place)
        before = sum(len(unit.launches) for unit in (*gathers, *scatters))
        for i, unit in enumerate(gathers):
            self._gather(unit, gathers[max(i - self.prefetch, 0) : i])
        for unit, waited in zip(scatters, self._waited(scatters)):
            self._scatter(unit, waited)
        self._reorder()
        return Overlapped(len(gathers), len(scatters), before, self.made)

    # Gathers

    def _gather(self, unit: _Unit, ahead: Sequence[_Unit]) -> None:
        """Launched within the first of the units `ahead`; where there are fewer than `prefetch`, at its start."""
        anchor = unit.place
        if ahead:
            end = ahead[1].place if len(ahead) > 1 else unit.place
            anchor = self._window(ahead[0].place, end, {self.channel(node) for node in unit.launches})
        order = -1 if anchor < unit.place else -3  # waits stand at -2
        for node in unit.launches:
            self._own_inputs(node)
            for item in inputs_chain(node):
                if item not in self.places:  # gathers of a tied parameter share it, and the first needs it first
                    self._place(item, anchor, order)
        waits = [next(iter(node.users)) for node in unit.launches]
        for node in self._together(unit.launches):
            self._place(node, anchor, order)
        for wait in waits:
            self._place(wait, unit.place, -2)

    def _own_inputs(self, gather: fx.Node) -> None:
        """A gather that is run again casts its shard again: the cast one need not be kept."""
        chain = inputs_chain(gather)
        if is_forward(gather) or not chain:
            return
        copies: dict[fx.Node, fx.Node] = {}
        with self.graph.inserting_before(gather):
            for node in chain:
                copies[node] = self.graph.node_copy(node, lambda x: copies.get(x, x))
                copies[node].meta["phase"] = gather.meta.get("phase")
        gather.replace_input_with(chain[-1], copies[chain[-1]])

    def _kernel_start(self, place: int) -> int:
        """After the last node before `place` that no kernel reaches over."""
        while place > 0 and not self._cuts(self.nodes[place - 1]):
            place -= 1
        return place

    def _kernel_end(self, place: int) -> int:
        """Before the first node after `place` that no kernel reaches over."""
        while place + 1 < len(self.nodes) and not self._cuts(self.nodes[place + 1]):
            place += 1
        return place

    def _cuts(self, node: fx.Node) -> bool:
        if node.op != "call_function" or node in self.moving:
            return node.op == "output" or node.op == "placeholder"
        return not is_free(node) and (
            not is_fusible(node) or getattr(node.target, "namespace", "") not in ("aten", "prims")
        )

    def _window(self, start: int, end: int, channels: set[str]) -> int:
        """Where in a unit the next one's gathers are launched: before the stretch between collectives on their
        `channels` that computes longest."""
        best, most, work, at = start, -1.0, 0.0, start
        for i in range(start, end + 1):
            node = self.nodes[i]
            waits = node.target is _WAIT and node not in self.own_waits and self.channel(launch_of(node)) in channels
            if waits or i == end:
                if work > most:
                    best, most = at, work
                work, at = 0.0, i + 1
            work += _flops(node, self.rows)
        return best

    # Scatters

    def _scatter_units(self) -> list[_Unit]:
        """Scattered gradients by the unit of their parameter, in the order in which they are ready."""
        used_by: dict[str, list[int]] = {}
        for number, unit in enumerate(_gather_units(self.graph, self.index, is_forward)):
            for node in unit.launches:
                used_by.setdefault(str(node.meta.get("param")), []).append(number)
        # of a tied parameter the last use is the first to have its gradient
        numbers = {node: used_by[name].pop() if used_by.get(name) else -1 for node, name in self.names.items()}
        units: dict[int, _Unit] = {}
        for node, number in numbers.items():
            unit = units.setdefault(number, _Unit(("", ""), 0))
            unit.launches.append(node)
            unit.place = max(unit.place, self._kernel_end(self._ready(node, numbers)))
        by_place: dict[int, _Unit] = {}
        for unit in sorted(units.values(), key=lambda unit: unit.place):
            by_place.setdefault(unit.place, _Unit(unit.key, unit.place)).launches.extend(unit.launches)
        return list(by_place.values())

    def _ready(self, node: fx.Node, numbers: Mapping[fx.Node, int]) -> int:
        """Where a scatter can stand: where it does or, if what leads to nothing else could be computed before the
        gradients of another unit or more, there. A parameter that it reads comes when it is gathered. numbers: of the
        units."""
        own, outside, stack = {node}, set[fx.Node](), [node]
        while stack:
            for source in stack.pop().all_input_nodes:
                if source.op == "call_function" and source not in self.moving and all(u in own for u in source.users):
                    own.add(source)
                    stack.append(source)
                else:
                    outside.add(source)
        ready = max(self.index[source] for source in outside - own)
        between = {numbers[other] for other in numbers if ready < self.index[other] < self.index[node]}
        if len(between - {numbers[node]}) < 2:
            return self.index[node]
        place = self._kernel_end(ready)
        for item in sorted(own - {node}, key=self.index.__getitem__):
            self._place(item, place, 1)
        return place

    def _parameters_of_scatters(self) -> dict[fx.Node, str]:
        """Scatters that lead to nothing but one gradient in the output."""
        (output,) = self.graph.find_nodes(op="output")
        results = output.args[0]
        assert isinstance(results, tuple | list)
        name_of = {node: name for node, name in zip(results[1:], self.gradients) if isinstance(node, fx.Node)}
        found: dict[fx.Node, str] = {}
        for node in self.graph.find_nodes(op="call_function", target=_SCATTER):
            after = _after(node)
            ends = {name_of.get(item) for item in after if output in item.users}
            name = ends.pop() if len(ends) == 1 else None
            if name is not None and len(node.users) == 1:
                found[node] = name
        return dict(sorted(found.items(), key=lambda item: self.index[item[0]]))

    def _waited(self, units: list[_Unit]) -> list[int | None]:
        """Where each unit's scatter is waited for; None: at the end. A unit waits for those before it, which have had
        the unit's backward to themselves, but not for what is small beside the largest: the wait would gain nothing."""
        places: list[int | None] = [None] * len(units)
        sizes = [
            storages_bytes((s for node in unit.launches for s in node.all_input_nodes), self.rows) for unit in units
        ]
        oldest = 0
        for i, unit in enumerate(units):
            while sum(sizes[oldest : i + 1]) > max(sizes[: i + 1]) * (1.0 + _SMALL):
                places[oldest] = unit.place
                oldest += 1
        return places

    def _scatter(self, unit: _Unit, waited: int | None) -> None:
        late = sorted({item for node in unit.launches for item in _after(node)}, key=self.index.__getitem__)
        for node in sorted(self._casts(unit), key=self.index.__getitem__):
            self._place(node, unit.place, 2)
        for node in self._together(unit.launches):
            self._place(node, unit.place, 3)
        for node in late:
            self._place(node, *((len(self.nodes) - 1, -1) if waited is None else (waited, 1)))

    def _casts(self, unit: _Unit) -> set[fx.Node]:
        """Casts, padding and views that only lead to the unit's scatters."""
        found: set[fx.Node] = set()
        stack = [source for node in unit.launches for source in node.all_input_nodes]
        leads = set(unit.launches)
        while stack:
            node = stack.pop()
            if node.op == "call_function" and _light(node, self.rows) and all(user in leads for user in node.users):
                found.add(node)
                leads.add(node)
                stack += node.all_input_nodes
        return found

    # Both

    def _together(self, launches: Iterable[fx.Node]) -> list[fx.Node]:
        """One coalesced collective for each group and dtype, in place of `launches`; returns the new nodes in order."""
        buckets: dict[tuple[object, ...], list[fx.Node]] = {}
        for node in launches:
            buckets.setdefault((node.target, node.meta["val"].dtype, *node.args[1:]), []).append(node)
        self.made += len(buckets)
        result: list[fx.Node] = []
        for nodes in buckets.values():
            result += nodes if len(nodes) == 1 else self._coalesced(nodes)
        return result

    def _coalesced(self, nodes: list[fx.Node]) -> list[fx.Node]:
        first = nodes[0]
        arguments = ([node.args[0] for node in nodes], *first.args[1:])
        with self.graph.inserting_before(nodes[-1]):
            call = self.graph.call_function(_TOGETHER[first.target], arguments)  # type: ignore[index]
            call.meta = {**first.meta, "val": [node.meta["val"] for node in nodes]}
            items = [self.graph.call_function(operator.getitem, (call, i)) for i in range(len(nodes))]
        for node, item in zip(nodes, items):
            item.meta = dict(node.meta)
            node.replace_all_uses_with(item)
            self.graph.erase_node(node)
        return [call, *items]

    def _place(self, node: fx.Node, index: int, order: int) -> None:
        self.moved += 1
        self.places[node] = (index, order, self.moved)

    def _reorder(self) -> None:
        ordered = sorted(self.graph.nodes, key=lambda node: self.places.get(node) or (self.index.get(node, 0), 0, 0))
        last = ordered[0]
        for node in ordered[1:]:
            last.append(node)
            last = node
        self.graph.eliminate_dead_code()
        self.graph.lint()
        self.gm.recompile()


def _after(node: fx.Node) -> list[fx.Node]:
    """Everything computed from a node, the output not."""
    found: dict[fx.Node, None] = {}
    stack = list(node.users)
    while stack:
        item = stack.pop()
        if item.op != "output" and item not in found:
            found[item] = None
            stack += item.users
    return list(found)


_LIGHT = (
    torch.ops.aten._to_copy.default,
    torch.ops.aten.clone.default,
    torch.ops.aten.cat.default,
    torch.ops.aten.new_zeros.default,
)


def _light(node: fx.Node, rows: Rows) -> bool:
    """A view, or a copy that is no smaller than what it copies."""
    if isinstance(node.target, torch._ops.OpOverload) and node.target.is_view:
        return True
    grows = tensor_bytes(node.meta.get("val"), rows) >= storages_bytes(node.all_input_nodes, rows)
    return node.target in _LIGHT and grows


def _flops(node: fx.Node, rows: Rows) -> float:
    """Of matrix products and attention, up to factors that are alike."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return 0.0
    value = node.meta.get("val")
    if (node.target in MATMULS or node.target in GROUPED) and isinstance(value, Tensor):
        tensors = [x for x in node.args if isinstance(x, fx.Node)][:3]
        first = tensors[0] if node.target in GROUPED else tensors[-2]
        return float(elements(value.shape, rows) * elements(first.meta["val"].shape[-1:], rows))
    if node.target in ATTENTION:
        query = node.all_input_nodes[0].meta["val"]
        return 2.0 * elements(query.shape, rows) * elements(query.shape[-2:-1], rows)
    return 0.0
