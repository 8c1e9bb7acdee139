"""The exact optimum of the simulated step time under the memory bound.

Plans are simulated in the order of a lower bound of their time, until the next bound exceeds the best simulated time:
no plan left can be better. Three things keep the number of simulations small, none of which can lose the optimum:

- Memory is a sum over blocks at each moment, so plans that do not fit are dropped exactly, without simulation.
- Keeping activations takes no longer than offloading them or recomputing them, nor recomputing less than recomputing
  more, a whole loss head than a chunked one, the optimizer on the GPU than one in host memory: such a *saver* only adds
  tasks and waits to the same schedule. So a plan is skipped if it differs from one that fits in more savers only.
- Per block, an option with fewer savers that takes no more memory at any moment replaces the other.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from omnicompile.cost_model.step_model import StepModel
from omnicompile.cost_model.step_options import StepOptions
from omnicompile.cost_model.step_price import DTYPE_BYTES
from omnicompile.plan import LossHead, Plan
from omnicompile.planner.predict import capacity, predict, simulated_seconds
from omnicompile.planner.space import Point, Space
from omnicompile.planner.tables import BOUNDS, BlockTable, Option, TableMaker, option_savers, saves_no_more

Progress = Callable[[str], None]
Saver = tuple[int, ...]
Family = tuple[object, ...]
_SLACK = 1e-9
"""Relative and absolute (seconds) rounding allowed between a bound and a simulation."""


@dataclass(frozen=True)
class Combination:
    """A choice of one option per block (in the order of the program's blocks) at a point."""

    point: Point
    options: tuple[Option, ...]
    offload_optimizer: bool

    @property
    def savers(self) -> Saver:
        """Offloading and recompute of the optimizer, the loss head and each block: a larger one is never faster."""
        values: list[int] = [0, int(self.offload_optimizer), 0]
        for option in self.options:
            values += option_savers(option)
        return tuple(values)

    @property
    def family(self) -> Family:
        """What else the combination chooses."""
        return (self.point, *((o.plan.sharding, o.plan.layout) for o in self.options))

    @property
    def signature(self) -> Family:
        """What tells plans apart for a reader: all but how many replicas of a shard there are."""
        mesh, micro_batch = self.point.mesh, self.point.micro_batch
        sharded = tuple(o.plan.sharding for o in self.options[-1:])
        return (mesh.sp, mesh.ep, micro_batch, self.savers, sharded, *(o.plan.layout for o in self.options))


@dataclass(frozen=True)
class _Ranked:
    """A simulated plan; `order` sorts equally fast ones."""

    seconds: float
    savers: Saver
    key: str
    plan: Plan

    @property
    def order(self) -> tuple[float, Saver, str]:
        return self.seconds, self.savers, self.key


@dataclass
class Solution:
    """best: simulated plans, fastest first. explored: plans in the space. simulated: how many of them were."""

    best: list[Plan] = field(default_factory=list)
    explored: int = 0
    simulated: int = 0


class Solver:
    """Searches one space. `base` gives what every plan has in common (model, cluster, workload, dtypes)."""

    def __init__(self, space: Space, base: Plan, model: StepModel) -> None:
        self.space = space
        self.base = base
        self.model = model
        self.maker = TableMaker(model, space.frozen)
        self.capacity = capacity(model)
        self._blocks = [b.name for b in space.program.blocks]
        self._heads = {s.block for s in space.program.segments if s.logits is not None}
        self._work_options: dict[tuple[str, int, int], tuple[Option, ...]] = {}

    def solve(self, top: int = 1, progress: Progress | None = None) -> Solution:
        """The `top` fastest plans that fit, of which the first is optimal; none if no plan fits."""
        solution = Solution()
        queue: list[tuple[float, int, _Candidates]] = []
        for number, candidates in enumerate(self._all_candidates(solution)):
            heapq.heappush(queue, (candidates.bound, number, candidates))
        if progress:
            progress(f"{solution.explored} plans in {len(self.space.points)} meshes and micro-batches")
        self._best_first(queue, top, solution)
        if progress:
            progress(f"{solution.simulated} plans simulated")
        return solution

    def _best_first(self, queue: list[tuple[float, int, _Candidates]], top: int, solution: Solution) -> None:
        """Of plans alike in all but the sharding of side blocks (`signature`), the best is ranked."""
        seen: dict[Family, list[Saver]] = {}
        ranked: dict[Family, _Ranked] = {}
        while queue:
            bound, number, candidates = queue[0]
            if len(ranked) >= top and bound > sorted(entry.seconds for entry in ranked.values())[top - 1]:
                break
            combination = candidates.pop()
            if candidates.empty:
                heapq.heappop(queue)
            else:
                heapq.heapreplace(queue, (candidates.bound, number, candidates))
            if combination is None:
                continue
            signature = combination.signature
            leader = ranked.get(signature)
            if leader is not None and bound > leader.seconds:
                continue
            known = seen.setdefault(combination.family, [])
            savers = combination.savers
            if self.maker.nested and any(saves_no_more(other, savers) for other in known):
                continue
            known.append(savers)
            plan = self.plan_of(combination)
            solution.simulated += 1
            entry = _Ranked(simulated_seconds(plan, self.model), savers, plan_key(plan), plan)
            if leader is None or entry.order < leader.order:
                ranked[signature] = entry
        best = sorted(ranked.values(), key=lambda entry: entry.order)[:top]
        solution.best = [replace(entry.plan, prediction=predict(entry.plan, self.model)) for entry in best]

    def plan_of(self, combination: Combination) -> Plan:
        heads = [o.loss_head for o, b in zip(combination.options, self._blocks) if b in self._heads]
        return replace(
            self.base,
            mesh=combination.point.mesh,
            blocks={b: o.plan for b, o in zip(self._blocks, combination.options)},
            micro_batch=combination.point.micro_batch,
            accumulation=combination.point.accumulation,
            loss_head=heads[0] if heads else self.space.loss_heads[0],
            offload_optimizer=combination.offload_optimizer,
            overlap=combination.point.overlap,
        )

    def tables(self, point: Point, offload_optimizer: bool) -> list[BlockTable] | None:
        """One table per block, or None if some block has no option at this point."""
        step = StepOptions(
            point.micro_batch,
            LossHead.FULL,
            DTYPE_BYTES[self.base.param_dtype],
            DTYPE_BYTES[self.base.reduce_dtype],
            accumulates=point.accumulation > 1,
            overlap=point.overlap,
        )
        tables = []
        for block in self._blocks:
            options = self._options(block, point)
            shardings = self.space.shardings(block, point.mesh)
            if not options or not shardings:
                return None
            tables.append(self.maker.table(block, point.mesh, options, shardings, step, offload_optimizer))
        return tables

    def _options(self, block: str, point: Point) -> tuple[Option, ...]:
        key = (block, point.mesh.sp, point.mesh.ep)
        if key not in self._work_options:
            heads = self.space.loss_heads if block in self._heads else [LossHead.FULL]
            plans = self.space.work_options(block, point.mesh)
            self._work_options[key] = tuple(Option(plan, head) for plan, head in itertools.product(plans, heads))
        return self._work_options[key]

    def _all_candidates(self, solution: Solution) -> Iterator[_Candidates]:
        """The combinations of each point and place of the optimizer, those left out that cannot fit."""
        for point, offload_optimizer in itertools.product(self.space.points, self.space.offload_optimizer):
            tables = self.tables(point, offload_optimizer)
            if tables is None:
                continue
            solution.explored += math.prod(table.size for table in tables)
            bound = self._relaxed_bound(tables, point)
            if bound is not None:
                yield _Candidates(self, point, tables, offload_optimizer, bound)

    def _relaxed_bound(self, tables: list[BlockTable], point: Point) -> float | None:
        """A bound below those of all combinations that fit: each block on its own takes the fastest option that fits
        beside the others' smallest. None if some block has none."""
        least = [table.memory.min(axis=0) for table in tables]
        everything = sum(least)
        total = np.zeros(BOUNDS)
        for table, own in zip(tables, least):
            fits = (table.memory + (everything - own)).max(axis=1) <= self.capacity + 1.0
            if not fits.any():
                return None
            total += table.bounds[fits].min(axis=0)
        return float(step_bound(total[None, :], point.accumulation)[0])

    def join(self, tables: list[BlockTable], point: Point) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Bounds and option indices of all combinations that fit."""
        bounds, memory = np.zeros((1, BOUNDS)), np.zeros((1, tables[0].memory.shape[1]))
        picks, has_hsdp = np.zeros((1, 0), dtype=np.int64), np.zeros(1, dtype=bool)
        least = [table.memory.min(axis=0) for table in tables]
        for i, table in enumerate(tables):
            size, options = len(bounds), len(table.options)
            total = (memory[:, None, :] + table.memory[None, :, :]).reshape(size * options, -1)
            rest = sum(least[i + 1 :])
            kept = np.flatnonzero((total + rest).max(axis=1) <= self.capacity)
            if not len(kept):
                return np.zeros(0), np.zeros((0, len(tables)), dtype=np.int64)
            left, right = kept // options, kept % options
            memory = total[kept]
            bounds = bounds[left] + table.bounds[right]
            picks = np.concatenate([picks[left], right[:, None]], axis=1)
            has_hsdp = has_hsdp[left] | table.hsdp[right]
        seconds = step_bound(bounds, point.accumulation)
        if self.space.needs_replicas(point.mesh):
            return seconds[has_hsdp], picks[has_hsdp]
        return seconds, picks

    def any_plan(self) -> bool:
        """Whether there is any plan at all, whatever its memory."""
        return any(
            all(self._options(b, point) and self.space.shardings(b, point.mesh) for b in self._blocks)
            for point in self.space.points
            if self.space.offload_optimizer
        )

    def leanest(self) -> tuple[Plan, float] | None:
        """The plan that needs the least memory, and its bytes without context and slack; None if there is no plan."""
        found = min(self._leanest_by_point(), key=lambda entry: entry[0], default=None)
        return None if found is None else (self.plan_of(found[1]), found[0])

    def feasible(self) -> bool:
        """Whether any plan fits."""
        return any(peak <= self.capacity for peak, _ in self._leanest_by_point())

    def _leanest_by_point(self) -> Iterator[tuple[float, Combination]]:
        for point in self.space.points:
            for offload_optimizer in self.space.offload_optimizer:
                tables = self.tables(point, offload_optimizer)
                if tables is not None:
                    yield self._leanest_at(point, tables, offload_optimizer)

    @staticmethod
    def _leanest_at(point: Point, tables: list[BlockTable], offload_optimizer: bool) -> tuple[float, Combination]:
        """The combination with the lowest peak; whether hsdp occurs does not matter, as fsdp needs no more memory."""
        memory = np.zeros((1, tables[0].memory.shape[1]))
        picks = np.zeros((1, 0), dtype=np.int64)
        for table in tables:
            kept = _pareto(table.memory)
            total = (memory[:, None, :] + table.memory[None, kept, :]).reshape(-1, memory.shape[1])
            picks = np.concatenate([np.repeat(picks, len(kept), axis=0), np.tile(kept, len(picks))[:, None]], axis=1)
            memory = total
        index = int(np.argmin(memory.max(axis=1)))
        options = tuple(table.options[i] for table, i in zip(tables, picks[index]))
        return float(memory[index].max()), Combination(point, options, offload_optimizer)


class _Candidates:
    """Combinations of one point and one place of the optimizer in the order of their bounds, made when first needed."""

    def __init__(
        self, solver: Solver, point: Point, tables: list[BlockTable], offload_optimizer: bool, bound: float
    ) -> None:
        self._solver = solver
        self._point = point
        self._tables = tables
        self._offload_optimizer = offload_optimizer
        self._relaxed = bound
        self._picks: NDArray[np.int64] | None = None
        self._bounds: NDArray[np.float64] = np.zeros(0)
        self._next = 0

    @property
    def empty(self) -> bool:
        return self._picks is not None and self._next >= len(self._picks)

    @property
    def bound(self) -> float:
        return self._relaxed if self._picks is None else float(self._bounds[self._next])

    def pop(self) -> Combination | None:
        """The next combination; the first call only makes them, and returns None."""
        if self._picks is None:
            bounds, picks = self._solver.join(self._tables, self._point)
            order = np.argsort(bounds, kind="stable")
            self._bounds, self._picks = bounds[order], picks[order]
            return None
        row = self._picks[self._next]
        self._next += 1
        options = tuple(table.options[i] for table, i in zip(self._tables, row))
        return Combination(self._point, options, self._offload_optimizer)


def step_bound(bounds: NDArray[np.float64], accumulation: int) -> NDArray[np.float64]:
    """Seconds below which no step with these bounds (row, BOUNDS) is simulated, rounding allowed for."""
    half = BOUNDS // 2
    seconds = (accumulation - 1) * bounds[:, :half].max(axis=1) + bounds[:, half:].max(axis=1)
    return seconds * (1 - _SLACK) - _SLACK


def _pareto(memory: NDArray[np.float64]) -> NDArray[np.int64]:
    """Rows that no other row is below everywhere (of equal rows the first)."""
    order = np.argsort(memory.sum(axis=1), kind="stable")
    kept: list[int] = []
    for i in order:
        if not any((memory[k] <= memory[i]).all() for k in kept):
            kept.append(int(i))
    return np.array(kept, dtype=np.int64)


def plan_key(plan: Plan) -> str:
    """A total order of plans that are equally fast."""
    mesh = plan.mesh
    numbers = (mesh.dp_replicate, mesh.sp, mesh.ep, plan.accumulation)
    blocks = "/".join(f"{b.sharding}:{b.layout}:{b.recompute}:{b.offload}" for b in plan.blocks.values())
    overlap = "".join(f"{int(value):03d}" for value in vars(plan.overlap).values())
    return "/".join(f"{n:06d}" for n in numbers) + "/" + blocks + "/" + overlap
