"""All-to-alls are launched as soon as their input is there and waited for where their result is needed.

On the step graph of one rank, for exchanges of sequence parallelism (around attention) and of expert parallelism.
Only the order of operators changes, so results keep their bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import fx

from omnicompile.capture.classify import HEAVY, is_in_place
from omnicompile.passes.early_recompute import recompute_ahead
from omnicompile.passes.hidden_work import fill_waits
from omnicompile.passes.liveness import Rows, balanced_rows, peak_bytes, storage_of, storages_bytes
from omnicompile.passes.segments import RECOMPUTE, is_forward

_c10d = torch.ops._c10d_functional
EXCHANGE = _c10d.all_to_all_single.default
_WAIT = _c10d.wait_tensor.default
MOST_MEMORY = 1.03
"""Peak memory of a scheduled graph, over that of the graph as it was."""
_HELD = (2.0, 0.5, 0.2, 0.0)
"""Memory that products may keep until they run, as parts of what the peak may grow by: what is tried, in this order."""


class Clock(Protocol):
    """What is known of time when a graph is scheduled. Equal on all ranks."""

    def compute_seconds(self, node: fx.Node) -> float:
        """Of a product, attention or anchor; 0 for work that is fused with others."""

    def exchange_seconds(self, node: fx.Node) -> tuple[str, float]:
        """The channel that an all-to-all runs on, one after the other, and its seconds."""


@dataclass(frozen=True)
class Scheduled:
    """exchanges: in the graph. moved: products that were put into the time of an exchange. peak_before, peak: bytes.
    If the schedule would take too much memory the graph is left as it was: done is False."""

    exchanges: int
    moved: int = 0
    peak_before: int = 0
    peak: int = 0
    done: bool = False


def schedule_exchanges_pass(
    gm: fx.GraphModule,
    gradients: Sequence[str],
    clock: Clock,
    most_memory: float = MOST_MEMORY,
    measure: Callable[[fx.GraphModule], int] | None = None,
) -> Scheduled:
    """Reorder a step graph in place. gradients: placeholders of the parameters whose gradients follow the loss in the
    output. measure: bytes at the peak of a graph; by default node by node. A graph that is to be compiled holds less at
    some places and more at others, and where it holds most there is no room.

    Before: `q = x @ a; q2 = wait(exchange(q)); k = x @ b; k2 = wait(exchange(k)); o = attention(q2, k2);
    o2 = wait(exchange(o)); ...; da = x.t() @ dq; db = x.t() @ dk; ...; e2 = wait(exchange(e))`.
    After: `q = x @ a; Q = exchange(q); k = x @ b; K = exchange(k); q2 = wait(Q); k2 = wait(K); o = attention(q2, k2);
    O = exchange(o); o2 = wait(O); ...; db = x.t() @ dk; ...; E = exchange(e); da = x.t() @ dq; e2 = wait(E)`.

    - What leads to an exchange is computed first, in the order of the exchanges; of exchanges that can be launched at
      the same time the smallest goes first.
    - Exchanges of recomputed values are launched ahead of their use (`early_recompute`), if there is the memory.
    - Between two exchanges, products that need none of what is on its way come first, then each wait with the products
      that it was for. Element-wise work stays with what reads it.
    - Products that no exchange depends on (weight gradients) run where they stood, but for those that fill time in
      which a wait would stand still (`hidden_work`): they run right before it.

    Safe: every operator runs after what it reads; operators that draw random numbers keep their order, and so do reads
    and writes of memory that something writes into. All ranks run the same graph, so exchanges are launched in one
    order everywhere. Peak memory by `measure` is at most `most_memory` times what it was, or the graph stays as it is.
    Runs before `overlap_pass`, which moves the gathers and scatters of parameters.
    """
    exchanges = gm.graph.find_nodes(op="call_function", target=EXCHANGE)
    if not exchanges:
        return Scheduled(0)
    rows = balanced_rows(gm.graph)
    original = list(gm.graph.nodes)
    measure = measure or (lambda graph: peak_bytes(graph, rows, in_flight=True).total)
    before = measure(gm)
    early = recompute_ahead(original, clock)
    for start in (early, original) if early != original else (original,):
        reorder(gm.graph, start)
        demanded = _Demand(gm.graph, rows).order()
        for held in _HELD:
            filled = fill_waits(demanded, gradients, clock, held * (most_memory - 1.0) * before, rows)
            reorder(gm.graph, filled.order)
            peak = measure(gm)
            if peak <= most_memory * before:
                gm.graph.lint()
                gm.recompile()
                return Scheduled(len(exchanges), filled.moved, before, peak, True)
    reorder(gm.graph, original)
    return Scheduled(len(exchanges), 0, before, before)


def reorder(graph: fx.Graph, order: Iterable[fx.Node]) -> None:
    """Give the nodes of `graph` this order."""
    nodes = iter(order)
    last = next(nodes)
    for node in nodes:
        last.append(node)
        last = node


def is_exchange_wait(node: fx.Node) -> bool:
    return node.target is _WAIT and node.all_input_nodes[0].target is EXCHANGE


def _takes_time(node: fx.Node) -> bool:
    return node.target in HEAVY or is_exchange_wait(node)


class _Demand:
    """Orders a graph by what exchanges demand. index: original positions. leads: what an exchange depends on."""

    def __init__(self, graph: fx.Graph, rows: Rows) -> None:
        self.nodes = list(graph.nodes)
        self.rows = rows
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.extra = _order_to_keep(self.nodes)
        self.done: dict[fx.Node, None] = {}
        self.launched: dict[fx.Node, int] = {}
        exchanges = [node for node in self.nodes if node.target is EXCHANGE]
        self.leads = {*exchanges, *self._behind(exchanges)}
        self._hold_back_recompute()
        self.late: list[fx.Node] = []
        self.next = 0

    def order(self) -> list[fx.Node]:
        """Every node, in the new order."""
        for node in self.nodes:
            if node.op in ("placeholder", "get_attr"):
                self.done[node] = None
        for launch in self._launches():
            self._segment({*self._behind([launch]), *self._passed(self.index[launch])})
            self.launched[launch] = len(self.launched)
            self.done[launch] = None
        output = self.nodes[-1]
        self._segment({node for node in self.nodes if node not in self.done and node is not output})
        return [*self.done, output]

    def _hold_back_recompute(self) -> None:
        """What is run again reads early values: it stays behind what the backward did before it for exchanges, but not
        behind the mere arrival of one."""
        before: dict[fx.Node, None] = {}
        for node in self.nodes:
            if node.meta.get("phase") == RECOMPUTE:
                if not any(source.meta.get("phase") == RECOMPUTE for source in node.all_input_nodes):
                    self.extra.setdefault(node, []).extend(before)
            elif node in self.leads and not is_exchange_wait(node) and not is_forward(node):
                for source in node.all_input_nodes:
                    before.pop(source, None)
                before[node] = None

    def _inputs(self, node: fx.Node) -> Iterator[fx.Node]:
        yield from node.all_input_nodes
        yield from self.extra.get(node, ())

    def _behind(self, wanted: Iterable[fx.Node]) -> set[fx.Node]:
        """What these nodes depend on and has not been ordered yet."""
        found: set[fx.Node] = set()
        stack = list(wanted)
        while stack:
            for source in self._inputs(stack.pop()):
                if source not in found and source not in self.done:
                    found.add(source)
                    stack.append(source)
        return found

    def _launches(self) -> list[fx.Node]:
        """Exchanges in the order of the graph; smaller ones first among those that come of the same product."""
        made_by: dict[fx.Node, int] = {}
        groups: dict[int, list[fx.Node]] = {}
        for node in self.nodes:
            hard = (
                self.index[s] if s.target in HEAVY or is_exchange_wait(s) else made_by[s] for s in self._inputs(node)
            )
            made_by[node] = max(hard, default=-1)
            if node.target is EXCHANGE:
                groups.setdefault(made_by[node], []).append(node)
        for group in groups.values():
            group.sort(key=lambda node: storages_bytes([node], self.rows))  # type: ignore[arg-type]
        return [node for group in groups.values() for node in group]

    def _passed(self, end: int) -> set[fx.Node]:
        """What stood before position `end` and no exchange depends on, if its inputs are there by then."""
        self.late += [n for n in self.nodes[self.next : end] if n not in self.leads and n not in self.done]
        self.next = max(self.next, end)
        ready: set[fx.Node] = set()
        waiting: list[fx.Node] = []
        here = self._behind([self.nodes[end]])
        for node in self.late:
            there = all(s in self.done or s in here or s in ready for s in self._inputs(node))
            there = there and not self._just_launched(node)
            (ready.add if there else waiting.append)(node)
        self.late = waiting
        return ready

    def _just_launched(self, node: fx.Node) -> bool:
        """A wait for the last exchange, or one that is not launched yet."""
        return is_exchange_wait(node) and self.launched.get(node.all_input_nodes[0], 10**9) >= len(self.launched) - 1

    def _segment(self, members: set[fx.Node]) -> None:
        """Order what lies between two launches: by the waits that products depend on, and as the graph had it."""
        nodes = sorted(members, key=self.index.__getitem__)
        stage = self._stages(nodes)
        for node in sorted(nodes, key=lambda node: (stage[node], self.index[node])):
            self.done[node] = None

    def _stages(self, nodes: list[fx.Node]) -> dict[fx.Node, int]:
        """0 for what depends on no wait among `nodes`, n for what depends on the n-th to be launched and no later one.
        Products as early as they can, everything else as late as what reads it."""
        waits = [node for node in nodes if is_exchange_wait(node)]
        waits.sort(key=lambda wait: self.launched[wait.all_input_nodes[0]])
        number = {wait: i + 1 for i, wait in enumerate(waits)}
        stage: dict[fx.Node, int] = {}
        for node in nodes:
            stage[node] = max((stage[s] for s in self._inputs(node) if s in stage), default=0)
            stage[node] = max(stage[node], number.get(node, 0))
        readers: dict[fx.Node, int] = {}
        for node in reversed(nodes):
            if node.target not in HEAVY:
                stage[node] = readers.get(node, len(waits))
            for source in self._inputs(node):
                if source in stage:
                    readers[source] = min(readers.get(source, len(waits)), stage[node])
        return stage


def _order_to_keep(nodes: list[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """What a node must follow without reading it: earlier random operators, and reads and writes of written memory."""
    extra: dict[fx.Node, list[fx.Node]] = {}
    written = {storage_of(node) for node in nodes if is_in_place(node)}
    random: fx.Node | None = None
    users: dict[fx.Node, list[fx.Node]] = {}
    writers: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
            if random is not None:
                extra.setdefault(node, []).append(random)
            random = node
        for owner in {storage_of(s) for s in node.all_input_nodes} & written:
            if owner in writers:
                extra.setdefault(node, []).append(writers[owner])
            if is_in_place(node) and storage_of(node) is owner:
                extra.setdefault(node, []).extend(users.pop(owner, []))
                writers[owner] = node
            else:
                users.setdefault(owner, []).append(node)
    return extra
