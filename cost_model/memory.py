"""Bytes on one GPU by kind, and the moment of the step when they peak.

Trained parameters are kept as float32 master shards, gathered and reduced in the plan's dtypes, with two float32
moments (AdamW). A replicated block keeps a whole copy in compute precision besides. Frozen parameters, and trained
ones whose optimizer is offloaded (master weights and moments in host memory), are kept in compute precision only.
Gradients are kept in the reduction dtype: sharded like the parameters, whole for replicated blocks. Without
accumulation they come into being one after the other in the backward; a second micro-step finds them all there.

Memory changes at the borders of runs, so the peak is the largest of a few moments per run: `moments` lists them. The
bytes at a moment are a sum over blocks, each a function of that block's plan alone; the planner relies on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from omnicompile.cost_model.hardware import Hardware
from omnicompile.cost_model.step_layout import Groups, local_params, owned_params
from omnicompile.cost_model.step_options import StepOptions
from omnicompile.program import Program, Segment

if TYPE_CHECKING:
    from omnicompile.cost_model.step_model import BlockWeights, BlockWork

Table = NDArray[np.float64]

KINDS = ("parameters", "gradients", "optimizer", "activations", "temporaries", "gathered parameters", "buffers")
ACTIVATION_ROW, _TEMPORARIES, _GATHERED, _BUFFERS, _GRADIENTS = 3, 4, 5, 6, 1


@dataclass(frozen=True)
class StaticMemory:
    """Bytes of a block's state on one GPU through the whole step; trained_numel: parameters updated on this GPU."""

    parameters: float
    gradients: float
    optimizer: float
    trained_numel: float

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer


def static_memory(
    segments: Sequence[Segment],
    groups: Groups,
    options: StepOptions,
    trained: bool,
    offload_optimizer: bool,
    whole_gradients: bool = False,
) -> StaticMemory:
    """State of a block's parameters, those shared with another segment counted once. trained: the block is; what the
    model itself does not let be trained is counted as frozen there too. whole_gradients: those of sharded parameters
    are summed over micro-steps before they are reduced."""
    everything = sum(owned_params(segments, groups))
    if not trained:
        return StaticMemory(everything * options.param_bytes, 0.0, 0.0, 0.0)
    dense, expert = owned_params(segments, groups, trained=True)
    local = dense + expert
    gradients = local * options.reduce_bytes
    if whole_gradients:
        gradients = sum(sum(local_params(s, groups, trained=True)) * s.count for s in segments) * options.reduce_bytes
    state = _trained_state(groups, options, dense, expert, gradients, offload_optimizer)
    return replace(state, parameters=state.parameters + (everything - local) * options.param_bytes)


def _trained_state(
    groups: Groups, options: StepOptions, dense: float, expert: float, gradients: float, offload_optimizer: bool
) -> StaticMemory:
    """State of `dense` and `expert` parameters that a rank holds and that are trained."""
    local = dense + expert
    updated = dense / groups.states.size + expert / groups.expert_states.size
    if offload_optimizer:
        return StaticMemory(local * options.param_bytes, gradients, 0.0, updated)
    copy = options.param_bytes if groups.resident and options.param_bytes != options.master_bytes else 0
    if groups.zero1:  # every rank has all parameters, and a part of the master weights
        whole = local * options.param_bytes + (updated * options.master_bytes if copy else 0.0)
        return StaticMemory(whole, gradients, updated * options.moment_bytes, updated)
    return StaticMemory(local * (options.master_bytes + copy), gradients, local * options.moment_bytes, local)


@dataclass(frozen=True)
class Moment:
    """A point in the step. run: index into `Program.runs`, -1 when the backward is over. saved: instances per run whose
    activations are kept. gathered: run indices whose parameters are gathered, with multiplicity. reducing: run of the
    gradients in flight. point: of the run's backward. fetching: the last of `gathered` is on its way, as it is while a
    layer's backward begins: it is launched first, and over before most of the layer's gradients are there."""

    backward: bool
    run: int
    saved: tuple[int, ...]
    gathered: tuple[int, ...]
    reducing: int | None = None
    point: int = 0

    @property
    def fetching(self) -> bool:
        return len(self.gathered) > 1 and self.point == 0


def moments(program: Program) -> tuple[Moment, ...]:
    """Every moment that can be the peak, whatever the plan: forward and backward of each run, in its middle (the next
    instance is prefetched) and at its border to the next run, the backward at each of its points, and the sums over
    replicas at the end."""
    counts = [run.count for run in program.runs]
    result: list[Moment] = []
    for i, count in enumerate(counts):
        before = tuple(counts[:i])
        rest = len(counts) - i - 1
        following = (i + 1,) if rest else ()
        full, less = (*before, count, *[0] * rest), (*before, count - 1, *[0] * rest)
        first = (*before, 1, *[0] * rest)
        previous = (i - 1,) if i else ()
        result.append(Moment(False, i, full, (i, *following)))
        if count > 1:
            result.append(Moment(False, i, less, (i, i)))
        for point in range(len(program.segment(program.runs[i].segment).backward)):
            result.append(Moment(True, i, first, (i, *previous), i if count > 1 else (i + 1 if rest else None), point))
            if count > 1:
                result.append(Moment(True, i, full, (i, i), i + 1 if rest else None, point))
            if count > 2:
                result.append(Moment(True, i, less, (i, i), i, point))
    return (*result, Moment(True, -1, (0,) * len(counts), ()))


@dataclass(frozen=True)
class _Coefficients:
    """(run, moment): how often each number of a block's runs counts at each moment. resident: gathered parameters when
    they are not resharded. backward: one table for each point. fetching: instances that are being gathered. done:
    instances whose backward is over. over: (moment), 1 when all of it is; ahead: before it begins."""

    segments: tuple[str, ...]
    saved: Table
    moving: Table
    forward: Table
    backward: tuple[Table, ...]
    gathered: Table
    fetching: Table
    resident: Table
    reducing: Table
    done: Table
    over: Table
    ahead: Table


class MemoryLayout:
    """The moments of a program and what adds to each. `trains`: by segment name, whether it has a backward."""

    def __init__(self, program: Program, trains: dict[str, bool]) -> None:
        self.moments = moments(program)
        self.blocks = tuple(program.segment(run.segment).block for run in program.runs)
        self._segments = tuple(run.segment for run in program.runs)
        self._trains = tuple(trains[name] for name in self._segments)
        self._counts = tuple(run.count for run in program.runs)
        self._of_block = {name: self._coefficients(name) for name in dict.fromkeys(self.blocks)}

    def work_bytes(self, name: str, work: BlockWork) -> Table:
        """Bytes (kind, moment) of block `name`'s activations."""
        table = np.zeros((len(KINDS), len(self.moments)))
        here = self._of_block.get(name)
        if here is None:
            return table
        units = [work.units[segment] for segment in here.segments]
        # Activations on their way to or from the host: the instance at work and the next one.
        table[ACTIVATION_ROW] = _row(u.saved for u in units) @ here.saved + _row(u.host for u in units) @ here.moving
        table[_BUFFERS] = _row(u.exchange for u in units) @ (here.forward + sum(here.backward))
        table[_TEMPORARIES] = _row(u.forward_peak for u in units) @ here.forward
        for point, at in enumerate(here.backward):
            # What a recompute made again goes before what was saved.
            again = [max(0.0, u.recomputed - _at(u.freed, point)) for u in units]
            saved = [max(0.0, _at(u.freed, point) - u.recomputed) for u in units]
            table[_TEMPORARIES] += _row(_at(u.backward_peaks, point) + a for u, a in zip(units, again)) @ at
            table[ACTIVATION_ROW] -= _row(saved) @ at
        return table

    def weights_bytes(self, name: str, weights: BlockWeights, reshard: bool) -> Table:
        """Bytes (kind, moment) of block `name`'s parameters, gradients and optimizer state."""
        table = np.zeros((len(KINDS), len(self.moments)))
        static = weights.static
        table[0], table[2] = static.parameters, static.optimizer
        here = self._of_block.get(name)
        if here is None:
            table[_GRADIENTS] = static.gradients
            return table
        units = [weights.units[segment] for segment in here.segments]
        table[_GRADIENTS] = static.gradients if weights.accumulates else _row(u.owned for u in units) @ here.done
        table[_BUFFERS] = weights.packed * here.over
        table[_GATHERED] = _row(u.gathered for u in units) @ (here.gathered if reshard else here.resident)
        table[_BUFFERS] += _row(u.staged for u in units) @ (here.fetching if reshard else here.fetching * here.ahead)
        for point, at in enumerate(here.backward):
            table[_GRADIENTS] += _row(_at(u.gradients, point) for u in units) @ at
        table[_GRADIENTS] += _row(u.reducing for u in units) @ here.reducing
        return table

    def _coefficients(self, name: str) -> _Coefficients:
        mine = [i for i, block in enumerate(self.blocks) if block == name]

        def table(value: Callable[[Moment, int], int]) -> Table:
            return np.array([[value(moment, run) for moment in self.moments] for run in mine], dtype=float)

        def gathered(moment: Moment, run: int) -> int:
            return moment.gathered.count(run) if self._trains[run] or not moment.backward else 0

        def resident(moment: Moment, run: int) -> int:  # whole from the forward to the backward
            here = gathered(moment, run)
            return max(here, moment.saved[run]) if self._trains[run] else here

        def backward(point: int) -> Table:
            return table(lambda m, run: int(m.run == run and m.backward and self._trains[run] and m.point == point))

        return _Coefficients(
            segments=tuple(self._segments[i] for i in mine),
            saved=table(lambda m, run: m.saved[run]),
            moving=table(lambda m, run: min(m.saved[run], 2) if abs(run - m.run) <= 1 else 0),
            forward=table(lambda m, run: int(m.run == run and not m.backward)),
            backward=tuple(backward(point) for point in range(1 + max(m.point for m in self.moments))),
            gathered=table(gathered),
            fetching=table(lambda m, run: min(1, gathered(m, run)) if m.fetching and m.gathered[-1] == run else 0),
            resident=table(resident),
            reducing=table(lambda m, run: int(m.reducing == run)),
            done=table(lambda m, run: self._counts[run] - m.saved[run] if m.backward else 0),
            over=np.array([float(moment.run < 0) for moment in self.moments]),
            ahead=np.array([float(not moment.backward) for moment in self.moments]),
        )


def _at(values: Sequence[float], point: int) -> float:
    """The value at a point; segments with fewer points than others have none there."""
    return values[point] if point < len(values) else 0.0


def _row(values: Iterable[float]) -> Table:
    return np.fromiter(values, dtype=float)


def overhead_bytes(hardware: Hardware) -> dict[str, float]:
    """What no plan changes: the CUDA context with communication buffers, and the allocator's slack."""
    return {
        "context": hardware.context_bytes,
        "allocator slack": hardware.memory_bytes * hardware.memory_reserve_fraction,
    }


def peak_breakdown(total: Table, hardware: Hardware) -> dict[str, float]:
    """Bytes by kind at the moment of the peak. `total`: (kind, moment), summed over blocks."""
    column = int(np.argmax(total.sum(axis=0)))
    kinds = {kind: float(total[row, column]) for row, kind in enumerate(KINDS)}
    return kinds | overhead_bytes(hardware)
