"""Time bounds and memory of every option of a block at once, as arrays.

The step time of a plan is not a sum over its blocks, but a bound below it is. With `begin(i)` the time at which layer i
of a run begins, n layers in the run, and per layer `chain` (the time of its compute and exchanges with all streams for
itself, or the work that nothing runs beside, slowed by what does), the parameter gather of the next layer, gradient
reductions and host copies:

    begin(n) - begin(1) >= (n - 1) * chain                      a layer's chain ends before the next one's begins
    begin(n) - begin(1) >= (n - 1) * (gather + exchange)        per channel: issued after begin(1), needed by begin(n)
                            + (n - 2) * reduce                  queued before the gather of layer n
    begin(n) - begin(1) >= (n - 1) * copy                       backward: activations fetched from the host
    begin(n) - begin(1) >= 2 * chain + (n - 3) * copy           forward: a layer waits for the offload two layers back

The first layer of the next run waits likewise for its gather, issued when the last layer of this run begins. The
maximum of these, summed over runs, plus the last chains, the first gather, the last reduction and the optimizer is a
bound of the simulated step; so is the work of each stream. Memory at each moment is exactly a sum over blocks. Work
(layout, recompute, offload) and weights (sharding) are priced apart and combined here by broadcasting.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from omnicompile.cost_model.memory import MemoryLayout
from omnicompile.cost_model.step_chain import Chain
from omnicompile.cost_model.step_model import BlockWeights, BlockWork, StepModel
from omnicompile.cost_model.step_options import StepOptions
from omnicompile.cost_model.step_overlap import makespan
from omnicompile.cost_model.step_units import UnitWeights, UnitWork
from omnicompile.plan import BlockPlan, LossHead, Mesh, Sharding
from omnicompile.program import Phase, Program, Recompute

Array = NDArray[np.float64]
BOUNDS = 8
"""Columns of a bound: the sequential path, "intra", "inter" and "copy" of an ordinary micro-step, then of the last."""
_CHANNELS = ("intra", "inter")


@dataclass(frozen=True)
class Option:
    """One choice for a block. loss_head: FULL for a block without a head."""

    plan: BlockPlan
    loss_head: LossHead


@dataclass(frozen=True)
class BlockTable:
    """Options of a block that may be part of an optimal plan. bounds: (option, BOUNDS) seconds. memory: (option,
    moment) bytes. size: options there were before dominated ones were dropped."""

    options: tuple[Option, ...]
    bounds: Array
    memory: Array
    hsdp: NDArray[np.bool_]
    size: int


@dataclass(frozen=True)
class _WorkTable:
    """Work of the options that may be part of an optimal plan: seconds (option, run, value) and bytes (option, moment).
    size: options there were. by_sharding: the options under each sharding."""

    times: Array
    memory: Array
    size: int
    by_sharding: dict[Sharding, tuple[Option, ...]]


@dataclass(frozen=True)
class _Shape:
    """The runs of a block: their segments and, as arrays, how often each repeats, whether it is the program's first and
    last, whether the backward ends with it, and whether it has a backward (0 or 1)."""

    segments: tuple[str, ...]
    count: NDArray[np.int64]
    first: NDArray[np.int64]
    last: NDArray[np.int64]
    ends_backward: NDArray[np.int64]
    trains: NDArray[np.int64]
    joined: NDArray[np.int64]  # the program's next run is the block's next


class TableMaker:
    """Makes block tables for one program and cluster, remembering those of work, weights and their combinations."""

    def __init__(self, model: StepModel, frozen: frozenset[str]) -> None:
        self.model = model
        self.frozen = frozen
        self.nested = recompute_is_nested(model.program)
        self.trains = {name: gradient.any for name, gradient in model.gradients(frozen).items()}
        self.memory = MemoryLayout(model.program, self.trains)
        self._shapes = {block.name: self._block_shape(block.name) for block in model.program.blocks}
        self._work: dict[tuple[object, ...], _WorkTable] = {}
        self._unit_bounds: dict[tuple[int, int], Array] = {}
        self._combined: dict[tuple[int, int, bool], BlockTable] = {}

    def _block_shape(self, block: str) -> _Shape:
        runs = self.model.program.runs
        trained = [i for i, run in enumerate(runs) if self.trains[run.segment]]
        mine = [i for i in range(len(runs)) if self.memory.blocks[i] == block]
        return _Shape(
            tuple(runs[i].segment for i in mine),
            np.array([runs[i].count for i in mine], dtype=np.int64),
            np.array([i == 0 for i in mine], dtype=np.int64),
            np.array([i == len(runs) - 1 for i in mine], dtype=np.int64),
            np.array([i == trained[0] if trained else False for i in mine], dtype=np.int64),
            np.array([self.trains[runs[i].segment] for i in mine], dtype=np.int64),
            np.array([i + 1 in mine for i in mine], dtype=np.int64),
        )

    def table(
        self,
        block: str,
        mesh: Mesh,
        options: tuple[Option, ...],
        shardings: Sequence[Sharding],
        step: StepOptions,
        offload_optimizer: bool,
    ) -> BlockTable:
        """Bounds and memory of the combinations of `options` and `shardings`."""
        work = self._work_table(block, mesh, options, step)
        parts = []
        for sharding in shardings:
            plan = work.by_sharding[sharding][0].plan
            weights = self.model.weights(block, plan, mesh, step, offload_optimizer, self.frozen)
            key = (id(work), id(weights), sharding is Sharding.HSDP)  # both are kept alive here and in the model
            if key not in self._combined:
                self._combined[key] = self._combine(block, work, weights, plan)
            parts.append(self._combined[key])
        return _concatenate(parts)

    def _combine(self, block: str, work: _WorkTable, weights: BlockWeights, plan: BlockPlan) -> BlockTable:
        ending = weights.optimizer + 2 * weights.optimizer_copy + sum(piece.seconds for piece in weights.replicas)
        bounds = self._bounds(block, work, weights) + np.repeat([0.0, ending], BOUNDS // 2)
        memory = work.memory + self.memory.weights_bytes(block, weights, plan.reshard).sum(axis=0)
        hsdp = np.full(len(memory), plan.sharding is Sharding.HSDP)
        return BlockTable(work.by_sharding[plan.sharding], bounds, memory, hsdp, work.size)

    def _work_table(self, block: str, mesh: Mesh, options: tuple[Option, ...], step: StepOptions) -> _WorkTable:
        step = replace(step, accumulates=True)  # which is about weights
        key = (block, mesh.sp, options[0].plan.ep, step)
        if key not in self._work:
            works = [
                self.model.work(block, o.plan, mesh, replace(step, loss_head=o.loss_head), self.frozen) for o in options
            ]
            times = np.array([self._work_rows(block, work) for work in works])
            memory = np.stack([self.memory.work_bytes(block, work).sum(axis=0) for work in works])
            # Parameters add equally to the memory of all options, so what they are does not matter here.
            kept = undominated(options, memory) if self.nested else list(range(len(options)))
            by_sharding = {s: tuple(replace_sharding(options[i], s) for i in kept) for s in Sharding}
            self._work[key] = _WorkTable(times[kept], memory[kept], len(options), by_sharding)
        return self._work[key]

    def _work_rows(self, block: str, work: BlockWork) -> list[list[float]]:
        edges = _by_stream(work.edge_forward + work.edge_backward)
        units = [work.units[name] for name in self._shapes[block].segments]
        return [*(_work_row(unit) for unit in units), [*edges, *[0.0] * (len(_WORK) - 3)]]

    def _bounds(self, block: str, work: _WorkTable, weights: BlockWeights) -> Array:
        """(option, BOUNDS) without the optimizer."""
        key = (id(work), id(weights.units))
        if key not in self._unit_bounds:
            shape = self._shapes[block]
            rows = np.array([_weight_row(weights.units[name]) for name in shape.segments])
            edges = work.times[:, -1, :3]
            micro, last = _run_bounds(work.times[:, :-1], rows, shape, self.model.hardware.contention_factor)
            micro[:, :3] += edges
            last[:, :3] += edges
            self._unit_bounds[key] = np.concatenate([micro, last], axis=1)
        return self._unit_bounds[key]


_WORK = (
    "forward", "forward compute", "forward intra", "forward inter", "again", "backward", "backward compute",
    "backward intra", "backward inter", "host", "forward span", "forward launched", "backward span",
    "backward launched",
)  # fmt: skip
_WEIGHTS = (
    "gather intra", "gather inter", "regather intra", "regather inter", "reduce intra", "reduce inter",
    "last intra", "last inter",
)  # fmt: skip


def _by_stream(chain: Chain) -> tuple[float, float, float]:
    """Seconds that nothing runs beside, and all on "intra" and on "inter"."""
    on = {channel: sum(p.seconds for p in chain if p.stream == channel) for channel in _CHANNELS}
    return sum(p.seconds for p in chain if not p.launch), on["intra"], on["inter"]


def _launched(chain: Chain) -> float:
    return sum(p.seconds for p in chain if p.launch)


def _compute(chain: Chain) -> float:
    return sum(p.seconds for p in chain if p.stream == "compute")


def _work_row(unit: UnitWork) -> list[float]:
    forward, again, backward = _by_stream(unit.forward), _by_stream(unit.again), _by_stream(unit.backward)
    return [
        forward[0], _compute(unit.forward), forward[1], forward[2], again[0], backward[0], _compute(unit.backward),
        again[1] + backward[1], again[2] + backward[2], unit.host_seconds, makespan(unit.forward),
        _launched(unit.forward), makespan(unit.again) + makespan(unit.backward), _launched(unit.backward),
    ]  # fmt: skip


def _weight_row(unit: UnitWeights) -> list[float]:
    gather = _by_stream(unit.gather)[1:]
    regather = gather if unit.regather else (0.0, 0.0)
    return [*gather, *regather, *_by_stream(unit.reduce)[1:], *_by_stream(unit.reduce + unit.once)[1:]]


def _run_bounds(work: Array, weights: Array, shape: _Shape, contention: float) -> tuple[Array, Array]:
    """Twice (option, 4), for an ordinary and for the last micro-step: the sequential path and the three streams, summed
    over a block's runs. `work`: (option, run, len(_WORK)); `weights`: (run, len(_WEIGHTS))."""
    count, trains = shape.count, shape.trains
    gather, regather = weights[:, 0:2], weights[:, 2:4]
    host = work[:, :, 9]
    forward = work[:, :, 0] + contention * np.minimum(work[:, :, 1], gather.sum(axis=1) + work[:, :, 11])
    forward = np.maximum(forward, work[:, :, 10])
    channels = (count - 1) * (gather + work[:, :, 2:4]).max(axis=2)
    copies = np.where((count > 2) & trains, 2 * forward + np.maximum(count - 3, 0) * host, 0.0)
    leave = np.maximum(forward, shape.joined * (_following(gather) + work[:, :, 2:4]).max(axis=2))
    path = np.maximum(np.maximum((count - 1) * forward, channels), copies) + leave + shape.first * gather.max(axis=1)
    beside = (regather + weights[:, 4:6]).sum(axis=1)
    backward = work[:, :, 4] + work[:, :, 5] + contention * np.minimum(work[:, :, 6], beside + work[:, :, 13])
    backward = np.maximum(backward, work[:, :, 12])
    needed = regather + work[:, :, 7:9]
    enters = _preceding((shape.joined * trains).astype(float))[:, None] * (_preceding(regather) + work[:, :, 7:9])
    leave = np.maximum(backward, enters.max(axis=2))
    loads = (count * trains)[:, None] * work[:, :, 7:9] + (trains * (count - shape.last))[:, None] * regather
    loads = loads + count[:, None] * (gather + work[:, :, 2:4])
    copy = (2 * count * trains * host).sum(axis=1)
    halves = []
    for columns in (slice(4, 6), slice(6, 8)):
        reduce = weights[:, columns]
        queued = (count - 1)[:, None] * needed + np.maximum(count - 2, 0)[:, None] * reduce
        slowest = np.maximum(np.where(needed > 0, queued, 0.0).max(axis=2), (count - 1) * host)
        back = np.maximum((count - 1) * backward, slowest) + leave + shape.ends_backward * reduce.sum(axis=1)
        streams = (loads + (count * trains)[:, None] * reduce).sum(axis=1)
        halves.append(np.column_stack([(path + trains * back).sum(axis=1), streams, copy]))
    return halves[0], halves[1]


def _following(rows: Array) -> Array:
    """Each run's value of the next run of the block (0 for the last)."""
    return np.concatenate([rows[1:], np.zeros_like(rows[:1])])


def _preceding(rows: Array) -> Array:
    """Each run's value of the run before it (0 for the first)."""
    return np.concatenate([np.zeros_like(rows[:1]), rows[:-1]])


def replace_sharding(option: Option, sharding: Sharding) -> Option:
    return Option(replace(option.plan, sharding=sharding), option.loss_head)


def _concatenate(parts: Sequence[BlockTable]) -> BlockTable:
    return BlockTable(
        tuple(itertools.chain.from_iterable(part.options for part in parts)),
        np.concatenate([part.bounds for part in parts]),
        np.concatenate([part.memory for part in parts]),
        np.concatenate([part.hsdp for part in parts]),
        sum(part.size for part in parts),
    )


def option_savers(option: Option) -> tuple[int, int, int]:
    """How an option saves memory by work: (loss head chunked, offload, recompute)."""
    recompute = list(Recompute).index(option.plan.recompute)
    return int(option.loss_head is LossHead.CHUNKED), int(option.plan.offload), recompute


def saves_no_more(left: Sequence[int], right: Sequence[int]) -> bool:
    """Whether savers `left` are at most as slow as `right` for certain; both triples as of `option_savers`, one after
    another. With offloading on, recomputing more also moves less, so then recompute compares only with itself."""
    for i in range(0, len(left), 3):
        if left[i] > right[i] or left[i + 1] > right[i + 1] or left[i + 2] > right[i + 2]:
            return False
        if left[i + 1] and left[i + 2] != right[i + 2]:
            return False
    return True


def undominated(options: Sequence[Option], memory: Array) -> list[int]:
    """Indices of options that no other of equal layout and at most their savers beats in memory at every moment."""
    savers = [(option_savers(o), o.plan.layout) for o in options]
    kept = [True] * len(options)
    for i, (mine, layout) in enumerate(savers):
        for j, (other, other_layout) in enumerate(savers):
            better = i != j and kept[j] and layout == other_layout and saves_no_more(mine, other)
            if better and (memory[i] <= memory[j]).all():
                kept[j] = False
    return [i for i, keep in enumerate(kept) if keep]


def recompute_is_nested(program: Program) -> bool:
    """Whether each recompute policy runs again all that the weaker ones do, so that it cannot be faster."""
    for segment in program.segments:
        forward = {op.name for op in segment.phase_ops(Phase.FORWARD)}
        again = [set(segment.saved[policy].recompute_ops) & forward for policy in Recompute]
        if not all(milder <= stronger for milder, stronger in itertools.pairwise(again)):
            return False
    return True
