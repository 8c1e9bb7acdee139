"""The Schedule of one micro-step of one rank under a plan, and of the optimizer step that it is part of.

    forward:   layer 1 | layer 2 | layer 3 | ...        each instance: its chain of compute and the collectives that
    gathers:   2       | 3       | 4       | ...        compute waits for; beside it the parameters of the next one
    backward:  ... layer 3 | layer 2 | layer 1          are gathered, its gradients reduced, its activations copied
    reduces:           3   |     2   |       1

A gather is issued when the instance before its own begins, so that at most two instances' parameters are whole at once.
Gradient accumulation repeats the micro-step. Each micro-step is one call of forward and backward, after which all its
collectives have completed; so micro-steps do not overlap and their times add up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from omnicompile.cost_model.schedule import Dep, Loop, Schedule, Task
from omnicompile.cost_model.step_chain import Chain, contend
from omnicompile.cost_model.step_model import BlockCost, StepModel
from omnicompile.cost_model.step_overlap import renumbered
from omnicompile.cost_model.step_price import Piece
from omnicompile.cost_model.step_units import UnitCost
from omnicompile.plan import Plan
from omnicompile.program import Program


@dataclass(frozen=True)
class Step:
    """An optimizer step: `accumulation` - 1 micro-steps `micro`, then `last`, which also reduces over replicas and
    updates the parameters."""

    micro: Schedule
    last: Schedule
    accumulation: int


def build_step(program: Program, plan: Plan, model: StepModel) -> Step:
    """Schedules of one optimizer step of one rank."""
    blocks = model.plan_blocks(plan)
    return step_of_blocks(program, blocks, plan.accumulation, model.hardware.contention_factor)


def build_schedule(program: Program, plan: Plan, model: StepModel) -> Schedule:
    """The schedule of the step's last (with accumulation 1: only) micro-step, optimizer included."""
    return build_step(program, plan, model).last


def step_of_blocks(program: Program, blocks: dict[str, BlockCost], accumulation: int, contention: float) -> Step:
    last = _Builder(program, blocks, contention, last=True).build()
    micro = _Builder(program, blocks, contention, last=False).build() if accumulation > 1 else last
    return Step(micro, last, accumulation)


@dataclass(frozen=True)
class _Execution:
    """`count` equal executions in a row: of `unit`, each followed by one of `following`."""

    unit: UnitCost
    following: UnitCost | None
    count: int


def _executions(units: list[tuple[UnitCost, int]]) -> Iterator[_Execution]:
    for i, (unit, count) in enumerate(units):
        if count > 1:
            yield _Execution(unit, unit, count - 1)
        yield _Execution(unit, units[i + 1][0] if i + 1 < len(units) else None, 1)


@dataclass
class _Body:
    """The tasks of one loop; `issue` returns the name under which later tasks of the same loop can wait."""

    block: str
    tasks: list[Task] = field(default_factory=list)

    def issue(self, name: str, piece: Piece, after: tuple[Dep, ...] = (), alloc: float = 0.0, free: float = 0.0) -> str:
        self.tasks.append(Task(name, piece.stream, piece.seconds, piece.kind, self.block, after, alloc, free))
        return name


class _Builder:
    """Emits the loops of one micro-step in order, remembering which tasks later ones wait for."""

    def __init__(self, program: Program, blocks: dict[str, BlockCost], contention: float, last: bool) -> None:
        self._program = program
        self._blocks = blocks
        self._contention = contention
        self._last = last
        self._loops: list[Loop] = []
        self._gathered: tuple[str, ...] = ()  # qualified names of the gathers of the next instance
        self._fetched: tuple[str, ...] = ()
        self._chain_end: str = ""  # qualified name of the last task of the latest chain
        self._ends: dict[str, str] = {}  # latest task that occupies each communication stream

    def build(self) -> Schedule:
        order = [(self._unit(run.segment), run.count) for run in self._program.runs]
        self._prologue(order[0][0])
        self._forward(order)
        backward = [(unit, count) for unit, count in reversed(order) if unit.trains]
        if backward:
            self._turn(order[-1][0], backward[0][0])
            self._backward(backward)
        if self._last:
            self._optimizer()
        return Schedule(tuple(self._loops), sum(cost.weights.held for cost in self._blocks.values()))

    def _unit(self, segment: str) -> UnitCost:
        return self._blocks[self._program.segment(segment).block].units[segment]

    def _add(self, body: _Body, count: int) -> str:
        """Append the loop; returns its name."""
        name = f"{len(self._loops)}"
        self._loops.append(Loop(name, tuple(body.tasks), count))
        for task in body.tasks:
            if task.stream != "compute":
                self._ends[task.stream] = f"{name}.{task.name}"
        return name

    def _prologue(self, first: UnitCost) -> None:
        body = _Body(first.block)
        names = _gather_tasks(body, first, (), self._gathers(first))
        if names:
            loop = self._add(body, 1)
            self._gathered = tuple(f"{loop}.{name}" for name in names)

    def _gathers(self, unit: UnitCost) -> Chain:
        """What is gathered before a unit's forward."""
        return unit.weights.gather + (unit.weights.refresh if self._last else ())

    def _forward(self, order: list[tuple[UnitCost, int]]) -> None:
        last_run = self._last_runs()
        position = 0
        remaining = [count for _, count in order]
        for execution in _executions(order):
            self._forward_loop(execution)
            remaining[position] -= execution.count
            if not remaining[position]:
                block = execution.unit.block
                if last_run[block] == position:
                    self._edge(block, self._blocks[block].work.edge_forward)
                position += 1

    def _last_runs(self) -> dict[str, int]:
        return {self._program.segment(run.segment).block: i for i, run in enumerate(self._program.runs)}

    def _forward_loop(self, execution: _Execution) -> None:
        unit = execution.unit
        body = _Body(unit.block)
        gathers = () if execution.following is None else self._gathers(execution.following)
        repeated = execution.count > 1 or execution.following is unit
        waits = self._waits(self._gathered, gathers if repeated else ())
        if unit.work.host_seconds:
            waits += (Dep("offload", 2),)
        body.issue("begin", Piece("compute", 0.0, "compute"), waits, alloc=unit.work.forward_peak)
        chain = _cast(unit.weights.cast) + unit.work.forward
        chain, window = contend(chain, self._gathers(unit), self._contention)
        end = self._chain_tasks(body, chain, window, execution.following, gathers)
        kept = unit.work.saved + unit.work.host
        body.issue("end", Piece("compute", 0.0, "compute"), end, alloc=kept, free=_forward_free(execution))
        if unit.work.host_seconds:
            piece = Piece("copy", unit.work.host_seconds, "offload")
            body.issue("offload", piece, (Dep("end"),), free=unit.work.host)
        self._finish(body, execution)

    def _backward(self, order: list[tuple[UnitCost, int]]) -> None:
        executions = list(_executions(order))
        entered: set[str] = set()
        for execution in executions:
            block = execution.unit.block
            if block not in entered:
                entered.add(block)
                self._edge(block, self._blocks[block].work.edge_backward)
            self._backward_loop(execution)

    def _turn(self, last: UnitCost, first: UnitCost) -> None:
        """From forward to backward: what the last forward used is still whole, anything else is gathered again."""
        body = _Body(first.block)
        begin = (Dep(self._chain_end),)
        names = (
            _gather_tasks(body, first, begin, first.weights.gather)
            if first is not last and first.weights.regather
            else ()
        )
        if first.work.host_seconds:
            body.issue("fetch", Piece("copy", first.work.host_seconds, "offload"), begin, alloc=first.work.host)
        if body.tasks:
            loop = self._add(body, 1)
            self._gathered = tuple(f"{loop}.{name}" for name in names)
            self._fetched = (f"{loop}.fetch",) if first.work.host_seconds else ()

    def _backward_loop(self, execution: _Execution) -> None:
        unit, work, weights = execution.unit, execution.unit.work, execution.unit.weights
        body = _Body(unit.block)
        following = execution.following
        repeated = following is unit
        gathers = following.weights.gather if following is unit and unit.weights.regather else ()
        waits = self._waits(self._gathered, gathers)
        if unit.work.host_seconds:
            waits += self._waits(self._fetched, (), extra="fetch" if repeated else "")
        points = zip(work.backward_peaks, work.freed, weights.gradients)
        peak = work.recomputed + max(temporaries - freed + made for temporaries, freed, made in points)
        body.issue("begin", Piece("compute", 0.0, "compute"), waits, alloc=peak)
        prefetched = following if following is not None and following.weights.regather else None
        beside = (weights.gather if weights.regather else ()) + self._reductions(unit)
        again = renumbered(work.again, len(work.backward))
        chain = _cast(weights.cast if weights.regather else 0.0) + again + work.backward + _cast(weights.gradient_cast)
        chain, window = contend(chain, beside, self._contention)
        ahead = prefetched.weights.gather if prefetched is not None else ()
        end = self._chain_tasks(body, chain, window, prefetched, ahead)
        freed = peak + work.saved + work.host + weights.gathered
        kept = 0.0 if self._blocks[unit.block].weights.accumulates else weights.owned
        body.issue("end", Piece("compute", 0.0, "compute"), end, alloc=weights.reducing + kept, free=freed)
        if following is not None and following.work.host_seconds:
            piece = Piece("copy", following.work.host_seconds, "offload")
            body.issue("fetch", piece, (Dep("begin"),), alloc=following.work.host)
        self._reduce(body, unit)
        self._finish(body, execution)

    def _reductions(self, unit: UnitCost) -> Chain:
        """What is reduced beside the backward of the units before this one."""
        return unit.weights.reduce + (unit.weights.once if self._last else ())

    def _reduce(self, body: _Body, unit: UnitCost) -> None:
        pieces = self._reductions(unit)
        previous = "end"
        for i, piece in enumerate(pieces):
            free = unit.weights.reducing if i == len(pieces) - 1 else 0.0
            previous = body.issue(f"reduce{i}", piece, (Dep(previous),), free=free)
        if not pieces and unit.weights.reducing:
            body.issue("accumulated", Piece("compute", 0.0, "compute"), free=unit.weights.reducing)

    def _chain_tasks(
        self, body: _Body, chain: Chain, window: int, following: UnitCost | None, gathers: Chain
    ) -> tuple[Dep, ...]:
        """The chain's pieces one after another, launches beside them; the next instance's gathers are issued before
        piece `window`."""
        previous = "begin"
        launched: dict[int, str] = {}
        for i, piece in enumerate(chain):
            if i == window and following is not None:
                _gather_tasks(body, following, (Dep("begin"),), gathers)
            name = body.issue(f"work{i}", piece, (Dep(previous), *(Dep(launched[n]) for n in piece.after)))
            if piece.launch:
                launched[piece.launch] = name
            else:
                previous = name
        if not chain and following is not None:
            _gather_tasks(body, following, (Dep("begin"),), gathers)
        return (Dep(previous),)

    def _waits(self, earlier: tuple[str, ...], own: Chain, extra: str = "") -> tuple[Dep, ...]:
        """Wait for collectives issued by earlier loops and, in a repeated body, by its previous iteration."""
        waits = tuple(Dep(name) for name in earlier)
        waits += tuple(Dep(f"gather{i}", 1) for i in range(len(own)))
        return (*waits, Dep(extra, 1)) if extra else waits

    def _finish(self, body: _Body, execution: _Execution) -> None:
        loop = self._add(body, execution.count)
        names = {task.name for task in body.tasks}
        self._gathered = tuple(f"{loop}.{name}" for name in sorted(names) if name.startswith("gather"))
        self._fetched = (f"{loop}.fetch",) if "fetch" in names else ()
        self._chain_end = f"{loop}.end"

    def _edge(self, block: str, pieces: Chain) -> None:
        if not pieces:
            return
        body = _Body(block)
        previous = self._chain_end
        for i, piece in enumerate(pieces):
            body.issue(f"edge{i}", piece, (Dep(previous),))
            previous = f"edge{i}"
        body.issue("end", Piece("compute", 0.0, "compute"), (Dep(previous),))
        self._chain_end = f"{self._add(body, 1)}.end"

    def _optimizer(self) -> None:
        """The update of each block, once every gradient is reduced: over replicas too, one block after the other."""
        waits = tuple(Dep(name) for name in (*self._ends.values(), self._chain_end))
        for block, cost in self._blocks.items():
            if cost.weights.replicas:
                body = _Body(block)
                last = len(cost.weights.replicas) - 1
                for i, piece in enumerate(cost.weights.replicas):
                    alloc, free = (cost.weights.packed if i == end else 0.0 for end in (0, last))
                    waits = (Dep(body.issue(f"replicas{i}", piece, waits, alloc, free)),)
                waits = (Dep(f"{self._add(body, 1)}.{waits[0].name}"),)
        for block, cost in self._blocks.items():
            body = _Body(block)
            if cost.weights.optimizer:
                body.issue("update", Piece("compute", cost.weights.optimizer, "optimizer"), waits)
            if cost.weights.optimizer_copy:
                transfer = Piece("copy", cost.weights.optimizer_copy, "optimizer")
                body.issue("gradients out", transfer, waits)
                body.issue("weights in", transfer, (Dep("gradients out"),))
            if body.tasks:
                self._add(body, 1)


def _cast(seconds: float) -> Chain:
    return (Piece("compute", seconds, "compute"),) if seconds else ()


def _forward_free(execution: _Execution) -> float:
    """What the end of a forward gives back: temporaries, and the whole parameters if they are not kept."""
    unit = execution.unit
    kept = unit.trains and (not unit.weights.regather or execution.following is None)
    return unit.work.forward_peak + (0.0 if kept else unit.weights.gathered)


def _gather_tasks(body: _Body, unit: UnitCost, after: tuple[Dep, ...], gathers: Chain) -> list[str]:
    """All-gathers of a unit's parameters; the first allocates them all, and the last frees what they were staged in."""
    weights = unit.weights
    return [
        body.issue(
            f"gather{i}",
            piece,
            after,
            alloc=weights.gathered + weights.staged if i == 0 else 0.0,
            free=weights.staged if i == len(gathers) - 1 else 0.0,
        )
        for i, piece in enumerate(gathers)
    ]
