"""Bytes alive at every node of a graph, by walking it once.

A tensor's memory lives from the node that makes it to the last use of any view of it. Inputs live all the time, since
the caller holds them. While a node runs, what it reads and what it makes are both alive; temporaries inside a kernel
are not seen. Equal to what torch's MemTracker measures when the graph is run. When it is compiled, a kernel's results
may take the memory of what it is the last to read (`in_place`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import sympy
import torch
from torch import Tensor, fx

from omnicompile.capture.classify import is_in_place, is_view
from omnicompile.capture.fusion import in_one_piece

_c10d = torch.ops._c10d_functional
_WAIT = _c10d.wait_tensor.default
_CUT = torch.ops.aten.split_with_sizes.default
_EXCHANGE = _c10d.all_to_all_single.default

Rows = Mapping[sympy.Symbol, int]


@dataclass(frozen=True)
class Peak:
    """total: bytes at the peak, inputs included. inputs: bytes of the inputs. node: where the peak is, by name.
    holders: name of the node that made a tensor alive at the peak -> its bytes, largest first, inputs not included."""

    total: int
    inputs: int
    node: str
    holders: dict[str, int]

    @property
    def beyond_inputs(self) -> int:
        return self.total - self.inputs


def storage_of(node: fx.Node) -> fx.Node:
    """The node whose memory `node`'s result lives in: through views, in-place operators and waits for collectives. An
    element of a tuple of new tensors is a tensor of its own."""
    while node.op == "call_function" and node.args and isinstance(source := node.args[0], fx.Node):
        through = node.target is _WAIT or is_view(node) or is_in_place(node)
        if not (through or (node.target is operator.getitem and is_view(source))):
            break
        node = source
    return node


def balanced_rows(graph: fx.Graph) -> dict[sympy.Symbol, int]:
    """A value for each size that is known only at run time: rows that go to or come from one rank, if all ranks send
    each other equally many."""
    rows: dict[sympy.Symbol, int] = {}
    for node in graph.find_nodes(op="call_function", target=_CUT):  # rows in chunks, each for all ranks
        whole, parts = node.args[0].meta["val"].shape[0], node.args[1]
        sizes = [part.meta["val"].node.expr for part in parts if isinstance(part, fx.Node)]
        symbols = sorted({symbol for size in sizes for symbol in size.free_symbols}, key=str)
        if isinstance(whole, int):
            rows |= dict.fromkeys(symbols, whole // max(len(symbols), 1))
    for node in graph.find_nodes(op="call_function", target=_EXCHANGE):
        source, received, sent = node.args[:3]
        assert isinstance(source, fx.Node) and isinstance(received, list | tuple) and isinstance(sent, list | tuple)
        size = source.meta["val"].shape[0]
        if isinstance(size, torch.SymInt) and size.node.expr.free_symbols <= rows.keys():
            size = _known(size, rows)
        for split in (*received, *sent):
            symbol = split.meta["val"].node.expr if isinstance(split, fx.Node) else None
            if isinstance(symbol, sympy.Symbol) and isinstance(size, int):
                rows.setdefault(symbol, size // len(sent))
    return rows


def tensor_bytes(value: object, rows: Rows) -> int:
    """Bytes of the memory behind a tensor, of all in a tuple; 0 for anything else. Raises ValueError for a size not in
    `rows` that is not known."""
    if isinstance(value, tuple | list):
        return sum(tensor_bytes(item, rows) for item in value)
    if not isinstance(value, Tensor):
        return 0
    if all(isinstance(size, int) for size in value.shape):
        return int(value.untyped_storage().nbytes())
    return value.element_size() * elements(value.shape, rows)


def elements(shape: Sequence[int | torch.SymInt], rows: Rows) -> int:
    """Number of elements of a tensor of this shape. Raises ValueError as `tensor_bytes` does."""
    return math.prod(size if isinstance(size, int) else _known(size, rows) for size in shape)


def _known(size: torch.SymInt, rows: Rows) -> int:
    expression = sympy.sympify(size.node.expr)
    number = expression.xreplace({s: sympy.Integer(rows[s]) for s in expression.free_symbols if s in rows})
    if not number.is_number:
        raise ValueError(f"the size {size} is known only at run time: give its value in `rows`")
    return int(number)


def storages_bytes(nodes: Iterable[fx.Node], rows: Rows) -> int:
    """Bytes of the memory that these nodes own."""
    return sum(tensor_bytes(node.meta.get("val"), rows) for node in nodes)


@dataclass(frozen=True)
class Compiled:
    """How a graph's compute runs when it is compiled. kernels: nodes that run together, which read what any of them
    reads until all of their results are there. regions: nodes that are called together: what comes into one is held
    until it returns, whatever it reads last. in_registers: results that are never in memory. over: result -> tensor
    whose memory it takes."""

    kernels: Sequence[Sequence[fx.Node]] = ()
    regions: Sequence[Sequence[fx.Node]] = ()
    in_registers: Collection[fx.Node] = ()
    over: Mapping[fx.Node, fx.Node] = field(default_factory=dict)


def peak_bytes(
    gm: fx.GraphModule,
    rows: Rows | None = None,
    compiled: Compiled | None = None,
    in_flight: bool = False,
    staged: Mapping[fx.Node, int] | None = None,
) -> Peak:
    """Where the most memory is alive when `gm` runs node by node, or as `compiled`. rows: values of sizes known only at
    run time; by default balanced routing. in_flight: what a collective reads lives until it is waited for, as on a GPU;
    MemTracker does not count it. staged: collective -> bytes of the copies that it makes for itself until then."""
    rows = balanced_rows(gm.graph) if rows is None else rows
    return _Walk(gm.graph, rows, compiled or Compiled(), in_flight, staged or {}).run()


def launch_of(wait: fx.Node) -> fx.Node:
    """The collective that is waited for."""
    source = wait.all_input_nodes[0]
    return source.all_input_nodes[0] if source.target is operator.getitem else source


class _Walk:
    """One pass over a graph. `live`: storages alive, by the node that owns them. `copies`: those of collectives on
    their way."""

    def __init__(
        self, graph: fx.Graph, rows: Rows, compiled: Compiled, in_flight: bool, staged: Mapping[fx.Node, int]
    ) -> None:
        self.compiled, self.in_flight, self.staged = compiled, in_flight, staged
        self.rows, self.in_registers = rows, set(compiled.in_registers)
        self.nodes = in_one_piece(graph.nodes, compiled.kernels)
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self.inputs = {n for n in self.nodes if n.op in ("placeholder", "get_attr")}
        self.live: dict[fx.Node, int] = {}
        self.copies: dict[fx.Node, int] = {}
        self.total = 0
        self.frees = self._last_uses()

    def _last_uses(self) -> dict[int, list[fx.Node]]:
        """By position: the storages that nothing reads after it. A tuple dies with the last element taken from it."""
        last: dict[fx.Node, int] = {}

        def hold(items: Iterable[fx.Node], until: int) -> None:
            for item in items:
                owner = self._owner(item)
                last[owner] = max(last.get(owner, 0), until)

        end_of = self._ends(self.compiled.kernels)
        for index, node in enumerate(self.nodes):
            hold((node, *node.all_input_nodes), end_of.get(node, index))
            if self.in_flight and node.target is _WAIT:
                hold(launch_of(node).all_input_nodes, index)
        for region in self.compiled.regions:
            inside, end = set(region), max(self.position[node] for node in region)
            hold((source for node in region for source in node.all_input_nodes if source not in inside), end)
        frees: dict[int, list[fx.Node]] = {}
        for owner, index in last.items():
            if owner not in self.inputs:
                frees.setdefault(index, []).append(owner)
        return frees

    def _ends(self, groups: Iterable[Sequence[fx.Node]]) -> dict[fx.Node, int]:
        """Node -> position of the last one of its group."""
        ends = ((group, max(self.position[node] for node in group)) for group in groups)
        return {node: end for group, end in ends for node in group}

    def _owner(self, node: fx.Node) -> fx.Node:
        """The node whose memory a result lives in; that of a tensor that it is written over, if there is one."""
        owner = storage_of(node)
        while (source := self.compiled.over.get(owner)) is not None:
            owner = storage_of(source)
        return owner

    def run(self) -> Peak:
        held = sum(tensor_bytes(n.meta.get("val"), self.rows) for n in self.inputs if n.op == "placeholder")
        peak, at, holders = 0, "", dict[str, int]()
        for index, node in enumerate(self.nodes):
            if node.op == "call_function":
                self._start(node)
            if self.total > peak:
                peak, at = self.total, node.name
                holders = {owner.name: size for owner, size in self.live.items()}
                holders |= {f"{launch.name} (staged)": size for launch, size in self.copies.items()}
            for owner in self.frees.get(index, []):
                self.total -= self.live.pop(owner, 0)
            if node.target is _WAIT:
                self.total -= self.copies.pop(launch_of(node), 0)
        return Peak(held + peak, held, at, dict(sorted(holders.items(), key=lambda item: -item[1])))

    def _start(self, node: fx.Node) -> None:
        if node in self.staged:
            self.copies[node] = self.staged[node]
            self.total += self.staged[node]
        if self._owner(node) is not node:
            return
        size = 0 if node in self.in_registers else tensor_bytes(node.meta.get("val"), self.rows)
        if node.target is operator.getitem:  # moves from the tuple, which then holds the others only
            source = node.args[0]
            assert isinstance(source, fx.Node)
            size = min(size, self.live.get(source, 0))
            if source in self.live:
                self.live[source] -= size
                self.total -= size
        self.live[node] = size
        self.total += size
