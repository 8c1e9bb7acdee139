"""Time bounds and memory of every option of a block at once, as arrays.

The step time of a plan is not a sum over its blocks, but a bound below it is. With `begin(i)` the time at which layer i
of a run begins, n layers in the run, and per layer `chain` (compute and the collectives it waits for), the parameter
gather of the next layer, gradient reductions and host copies:

    begin(n) - begin(1) >= (n - 1) * chain                      a chain is strictly sequential
    begin(n) - begin(1) >= (n - 1) * (gather + exchange)        per channel: issued after begin(1), needed by begin(n)
                            + (n - 2) * reduce                  queued before the gather of layer n
    begin(n) - begin(1) >= (n - 1) * copy                       backward: activations fetched from the host
    begin(n) - begin(1) >= 2 * chain + (n - 3) * copy           forward: a layer waits for the offload two layers back

Their maximum, summed over runs, plus the last chains, the first gather, the last reduction and the optimizer is a bound
of the simulated step; so is the work of each stream. Memory at each moment is exactly a sum over blocks. Work (layout,
recompute, offload) and weights (sharding) are priced apart and combined here by broadcasting.
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
from omnicompile.cost_model.step_units import StepOptions
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
    """Work of several options: seconds (option, run, value) and bytes (option, moment)."""

    options: tuple[Option, ...]
    times: Array
    memory: Array


@dataclass(frozen=True)
class _Run:
    """Position of a run of the block: whether it is the program's first and last, and the last in the backward."""

    segment: str
    count: int
    first: bool
    last: bool
    ends_backward: bool
    trains: bool


class TableMaker:
    """Makes block tables for one program and cluster, remembering those of work, weights and their combinations."""

    def __init__(self, model: StepModel, frozen: frozenset[str]) -> None:
        self.model = model
        self.frozen = frozen
        self.memory = MemoryLayout(model.program)
        self.nested = recompute_is_nested(model.program)
        self.trains = {name: gradient.any for name, gradient in model.gradients(frozen).items()}
        self._runs = {block.name: self._block_runs(block.name) for block in model.program.blocks}
        self._work: dict[tuple[object, ...], _WorkTable] = {}
        self._weights: dict[tuple[int, bool], tuple[BlockWeights, Array, Array]] = {}
        self._combined: dict[tuple[int, int, bool], BlockTable] = {}

    def _block_runs(self, block: str) -> tuple[_Run, ...]:
        runs = self.model.program.runs
        trained = [i for i, run in enumerate(runs) if self.trains[run.segment]]
        return tuple(
            _Run(
                run.segment, run.count, i == 0, i == len(runs) - 1, bool(trained) and i == trained[0],
                self.trains[run.segment],
            )
            for i, run in enumerate(runs)
            if self.memory.blocks[i] == block
        )  # fmt: skip

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
            plan = replace(options[0].plan, sharding=sharding)
            weights = self.model.weights(block, plan, mesh, step, offload_optimizer, self.frozen)
            key = (id(work), id(weights), sharding is Sharding.HSDP)  # both are kept alive here and in the model
            if key not in self._combined:
                self._combined[key] = self._combine(block, work, weights, plan)
            parts.append(self._combined[key])
        return _concatenate(parts)

    def _combine(self, block: str, work: _WorkTable, weights: BlockWeights, plan: BlockPlan) -> BlockTable:
        _, times, state = self._weight_arrays(block, weights, plan.reshard)
        memory = work.memory + state
        kept = undominated(work.options, memory) if self.nested else np.arange(len(memory))
        options = tuple(replace_sharding(work.options[i], plan.sharding) for i in kept)
        bounds = self._bounds(block, work.times[kept], times)
        hsdp = np.full(len(kept), plan.sharding is Sharding.HSDP)
        return BlockTable(options, bounds, memory[kept], hsdp, len(memory))

    def _work_table(self, block: str, mesh: Mesh, options: tuple[Option, ...], step: StepOptions) -> _WorkTable:
        key = (block, mesh.sp, mesh.ep, step)
        if key not in self._work:
            works = [
                self.model.work(block, o.plan, mesh, replace(step, loss_head=o.loss_head), self.frozen)
                for o in options
            ]
            times = np.array([self._work_rows(block, work) for work in works])
            memory = np.stack([self.memory.work_bytes(block, work, self.trains).sum(axis=0) for work in works])
            self._work[key] = _WorkTable(options, times, memory)
        return self._work[key]

    def _work_rows(self, block: str, work: BlockWork) -> list[list[float]]:
        edges = _by_stream(work.edge_forward + work.edge_backward)
        return [*(_work_row(work, run) for run in self._runs[block]), [*edges, *[0.0] * (len(_WORK) - 3)]]

    def _weight_arrays(self, block: str, weights: BlockWeights, reshard: bool) -> tuple[BlockWeights, Array, Array]:
        key = (id(weights), reshard)
        if key not in self._weights:
            rows = [_weight_row(weights, run) for run in self._runs[block]]
            ending = [weights.optimizer, weights.optimizer_copy, *[0.0] * (len(_WEIGHTS) - 2)]
            memory = self.memory.weights_bytes(block, weights, reshard, self.trains).sum(axis=0)
            self._weights[key] = weights, np.array([*rows, ending]), memory
        return self._weights[key]

    def _bounds(self, block: str, work: Array, weights: Array) -> Array:
        """(option, BOUNDS) from `work` (option, run, value) and `weights` (run, value) of one sharding."""
        contention = self.model.hardware.contention_factor
        result = np.zeros((len(work), BOUNDS))
        for i, run in enumerate(self._runs[block]):
            for last in (False, True):
                columns = slice(BOUNDS // 2, None) if last else slice(0, BOUNDS // 2)
                result[:, columns] += _run_bound(work[:, i], weights[i], run, contention, last)
        edges, ending = work[:, -1], weights[-1]
        for offset in (0, BOUNDS // 2):
            result[:, offset] += edges[:, 0]
            result[:, offset + 1 : offset + 3] += edges[:, 1:3]
        result[:, BOUNDS // 2 :] += ending[0] + 2 * ending[1]
        return result


_WORK = (
    "forward", "forward compute", "forward intra", "forward inter", "again", "backward", "backward compute",
    "backward intra", "backward inter", "host",
)  # fmt: skip
_WEIGHTS = (
    "gather intra", "gather inter", "regather intra", "regather inter", "reduce intra", "reduce inter",
    "last intra", "last inter",
)  # fmt: skip


def _by_stream(chain: Chain) -> tuple[float, float, float]:
    """Seconds in all, on "intra" and on "inter"."""
    on = {channel: sum(p.seconds for p in chain if p.stream == channel) for channel in _CHANNELS}
    return sum(p.seconds for p in chain), on["intra"], on["inter"]


def _compute(chain: Chain) -> float:
    return sum(p.seconds for p in chain if p.stream == "compute")


def _work_row(work: BlockWork, run: _Run) -> list[float]:
    unit = work.units[run.segment]
    forward, again, backward = _by_stream(unit.forward), _by_stream(unit.again), _by_stream(unit.backward)
    return [
        forward[0], _compute(unit.forward), forward[1], forward[2], again[0], backward[0], _compute(unit.backward),
        again[1] + backward[1], again[2] + backward[2], unit.host_seconds,
    ]  # fmt: skip


def _weight_row(weights: BlockWeights, run: _Run) -> list[float]:
    unit = weights.units[run.segment]
    gather = _by_stream(unit.gather)[1:]
    regather = gather if unit.regather else (0.0, 0.0)
    return [*gather, *regather, *_by_stream(unit.reduce)[1:], *_by_stream(unit.reduce_last)[1:]]


def _run_bound(work: Array, weights: Array, run: _Run, contention: float, last: bool) -> Array:
    """(option, 4): the sequential path and the three streams of one run. `work`: (option, len(_WORK))."""
    again_n, again_m = run.count - 1, max(run.count - 2, 0)
    gather, regather = weights[0:2], weights[2:4]
    reduce = weights[6:8] if last else weights[4:6]
    forward = work[:, 0] + contention * np.minimum(work[:, 1], gather.sum())
    channels = again_n * (gather + work[:, 2:4])
    copies = 2 * forward + max(run.count - 3, 0) * work[:, 9] if run.count > 2 and run.trains else 0.0
    path = np.maximum(np.maximum(again_n * forward, channels.max(axis=1)), copies) + forward
    if run.first:
        path = path + gather.max()
    intra_inter = run.count * (gather + work[:, 2:4])
    copy = np.zeros(len(work))
    if run.trains:
        beside = (regather + weights[4:6]).sum()
        backward = work[:, 4] + work[:, 5] + contention * np.minimum(work[:, 6], beside)
        needed = regather + work[:, 7:9]
        channels = np.where(needed > 0, again_n * needed + again_m * reduce, 0.0)
        slowest = np.maximum(channels.max(axis=1), again_n * work[:, 9])
        path = path + np.maximum(again_n * backward, slowest) + backward
        if run.ends_backward:
            path = path + reduce.sum()
        gathers = run.count - 1 if run.last else run.count
        intra_inter = intra_inter + gathers * regather + run.count * (work[:, 7:9] + reduce)
        copy = 2 * run.count * work[:, 9]
    return np.stack([path, intra_inter[:, 0], intra_inter[:, 1], copy], axis=1)


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
    order = (Recompute.NONE, Recompute.SELECTIVE, Recompute.FULL)
    return int(option.loss_head is LossHead.CHUNKED), int(option.plan.offload), order.index(option.plan.recompute)


def saves_no_more(left: Sequence[int], right: Sequence[int]) -> bool:
    """Whether savers `left` are at most as slow as `right` for certain; both triples as of `option_savers`, one after
    another. With offloading on, recomputing more also moves less, so then recompute compares only with itself."""
    for i in range(0, len(left), 3):
        if left[i] > right[i] or left[i + 1] > right[i + 1] or left[i + 2] > right[i + 2]:
            return False
        if left[i + 1] and left[i + 2] != right[i + 2]:
            return False
    return True


def undominated(options: Sequence[Option], memory: Array) -> NDArray[np.int64]:
    """Indices of options (of one sharding) that no other of equal layout beats in both savers and memory."""
    kept: list[int] = []
    families: dict[object, list[int]] = {}
    for i, option in enumerate(options):
        families.setdefault(option.plan.layout, []).append(i)
    for members in families.values():
        savers = [option_savers(options[i]) for i in members]
        faster = np.array([[saves_no_more(a, b) for b in savers] for a in savers])
        smaller = (memory[members][:, None, :] <= memory[members][None, :, :]).all(axis=2)
        beaten = faster & smaller
        np.fill_diagonal(beaten, False)
        kept += [i for i, lost in zip(members, beaten.any(axis=0)) if not lost]
    return np.array(sorted(kept), dtype=np.int64)


def recompute_is_nested(program: Program) -> bool:
    """Whether each recompute policy runs again all that the weaker ones do, so that it cannot be faster."""
    for segment in program.segments:
        forward = {op.name for op in segment.phase_ops(Phase.FORWARD)}
        policies = (Recompute.NONE, Recompute.SELECTIVE, Recompute.FULL)
        again = [set(segment.saved[policy].recompute_ops) & forward for policy in policies]
        if not again[0] <= again[1] <= again[2]:
            return False
    return True
