"""Plan a model: the entry points of the command line and of `omnicompile.plan`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from omnicompile.cluster import Cluster
from omnicompile.cost_model.hardware import load_hardware
from omnicompile.cost_model.step_model import StepModel
from omnicompile.errors import InfeasibleError, PlanError
from omnicompile.plan import Mesh, Plan
from omnicompile.planner.explain import infeasible_message, why_lost, with_notes
from omnicompile.planner.leaner import leaner_note
from omnicompile.planner.overlaps import Gain, overlap_gains, refined
from omnicompile.planner.pins import Pins, parse_pins
from omnicompile.planner.predict import predict
from omnicompile.planner.solver import Solver
from omnicompile.planner.space import Space, empty_space_reason
from omnicompile.program import Program
from omnicompile.workload import Workload

if TYPE_CHECKING:
    from omnicompile.capture.source import ModelSource

Progress = Callable[[str], None]
_MOST_GPUS = 2**20
_SEQ_STEP = 1024
REFINED = 4
"""Best plans of the search whose finer ways to overlap are tried."""


def silent(_: str) -> None:
    """A progress function that says nothing."""


@dataclass(frozen=True)
class PlanResult:
    """plans: the best, then the next best found. lost_because: one line per plan ("" for the best). explored: plans in
    the space. simulated: how many of them were simulated. seconds: wall time by stage. gains: what each way to overlap
    gains for the best."""

    plans: list[Plan]
    program: Program
    explored: int
    seconds: dict[str, float]
    lost_because: list[str]
    simulated: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    gains: tuple[Gain, ...] = ()


def plan_source(
    source: ModelSource,
    cluster: Cluster,
    workload: Workload,
    pins: Mapping[str, str] | None = None,
    top: int = 1,
    cache: bool = True,
    progress: Progress = silent,
) -> PlanResult:
    """The fastest plan that fits for the model that `source` names, and the `top` - 1 next best.

    Raises what capturing raises, PlanError, and InfeasibleError when nothing fits.
    """
    program, seconds = _captured(source, workload, cache, progress)
    result = plan_program(program, cluster, workload, pins, top, progress, name=source.spec)
    return replace(result, seconds={"capture": seconds, **result.seconds})


def plan_program(
    program: Program,
    cluster: Cluster,
    workload: Workload,
    pins: Mapping[str, str] | None = None,
    top: int = 1,
    progress: Progress = silent,
    name: str = "",
) -> PlanResult:
    """As `plan_source`, for a Program that is at hand. `name`: what the plan calls the model."""
    started = time.perf_counter()
    search = Search(program, cluster, workload, parse_pins(pins or {}, program), name or program.source)
    progress(f"planning for {cluster.gpus} x {cluster.gpu}")
    model, parsed = search.solver.model, search.space.pins
    solution = search.solver.solve(max(top, REFINED), progress)
    if not solution.best:
        raise search.infeasible()
    best = sorted((refined(plan, model, parsed) for plan in solution.best), key=_seconds)[:top]
    leaner = leaner_note(best[0], model, parsed)
    plans = [with_notes(plan, search.space.refused) for plan in best]
    if leaner:
        plans[0] = replace(plans[0], notes=(*plans[0].notes, leaner))
    lost = ["", *(why_lost(plan, plans[0]) for plan in plans[1:])]
    seconds = {"plan": time.perf_counter() - started}
    gains = overlap_gains(plans[0], model)
    return PlanResult(plans, program, solution.explored, seconds, lost, solution.simulated, search.space.refused, gains)


def _seconds(plan: Plan) -> float:
    assert plan.prediction is not None
    return plan.prediction.step_seconds


def min_gpus(
    source: ModelSource,
    cluster: Cluster,
    workload: Workload,
    pins: Mapping[str, str] | None = None,
    top: int = 1,
    cache: bool = True,
    progress: Progress = silent,
) -> PlanResult:
    """A plan for the fewest GPUs that fit, of 1, 2, 4, ... and at most `cluster.gpus`. A global batch that is not given
    follows the number of GPUs. Raises InfeasibleError if not even `cluster.gpus` are enough."""
    program, seconds = _captured(source, workload, cache, progress)
    parsed = parse_pins(pins or {}, program)
    for gpus in _gpu_counts(cluster):
        smaller = replace(cluster, gpus=gpus)
        progress(f"trying {gpus} GPUs")
        if _fits(program, smaller, workload, parsed):
            result = plan_program(program, smaller, workload, pins, top, progress, name=source.spec)
            return replace(result, seconds={"capture": seconds, **result.seconds})
    raise Search(program, cluster, workload, parsed, source.spec).infeasible()


def _gpu_counts(cluster: Cluster) -> list[int]:
    """Powers of two up to a node and whole nodes by doubling, up to `cluster.gpus`, which is the last."""
    counts = [n for n in range(1, cluster.gpus_per_node + 1) if cluster.gpus_per_node % n == 0]
    while counts[-1] < cluster.gpus:
        counts.append(counts[-1] * 2)
    return [n for n in counts if n < cluster.gpus] + [cluster.gpus]


def max_seq_len(
    source: ModelSource,
    cluster: Cluster,
    workload: Workload,
    pins: Mapping[str, str] | None = None,
    top: int = 1,
    cache: bool = True,
    progress: Progress = silent,
) -> PlanResult:
    """A plan for the longest sample (a multiple of 1024 tokens) that fits; images and audio stay as they are. Raises
    InfeasibleError if not even 1024 tokens fit."""
    program, seconds = _captured(source, workload, cache, progress)
    parsed = parse_pins(pins or {}, program)

    def fits(seq_len: int) -> bool:
        progress(f"trying {seq_len} tokens")
        return _fits(resized(program, seq_len), cluster, replace(workload, seq_len=seq_len), parsed)

    longest = longest_that(fits)
    if longest is None:
        raise Search(resized(program, _SEQ_STEP), cluster, workload, parsed, source.spec).infeasible()
    best = replace(workload, seq_len=longest)
    result = plan_program(resized(program, longest), cluster, best, pins, top, progress, name=source.spec)
    return replace(result, seconds={"capture": seconds, **result.seconds})


def longest_that(fits: Callable[[int], bool], step: int = _SEQ_STEP, most: int = 2**24) -> int | None:
    """The largest multiple of `step` that fits (up to `most`), taking fitting to be monotone; None if not even one."""
    if not fits(step):
        return None
    low = 1
    while low * 2 * step <= most and fits(low * 2 * step):
        low *= 2
    high = low * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step


def _captured(source: ModelSource, workload: Workload, cache: bool, progress: Progress) -> tuple[Program, float]:
    from omnicompile.capture.api import capture_program

    started = time.perf_counter()
    program = capture_program(source, workload, cache, progress)
    return program, time.perf_counter() - started


def resized(program: Program, seq_len: int) -> Program:
    return replace(program, sample=replace(program.sample, seq_len=seq_len))


def _fits(program: Program, cluster: Cluster, workload: Workload, pins: Pins) -> bool:
    try:
        return Search(program, cluster, workload, pins, "").solver.feasible()
    except PlanError:
        return False


class Search:
    """A space and its solver. Raises PlanError if no plan is left to choose from, whatever its memory."""

    def __init__(self, program: Program, cluster: Cluster, workload: Workload, pins: Pins, name: str) -> None:
        load_hardware(cluster.gpu)
        self.space = Space(program, cluster, workload, pins)
        base = Plan(
            name,
            cluster,
            workload,
            Mesh(),
            {},
            param_dtype=pins.step.get("param_dtype", "bfloat16"),
            reduce_dtype=pins.step.get("reduce_dtype", "float32"),
        )
        self.solver = Solver(self.space, base, StepModel(program, cluster))
        if not self.solver.any_plan():
            raise PlanError(empty_space_reason(self.space))

    def infeasible(self) -> InfeasibleError:
        """The error for a space in which nothing fits."""
        found = self.solver.leanest()
        assert found is not None, "the space is not empty"
        leanest, needed = found
        leanest = replace(leanest, prediction=predict(leanest, self.solver.model))
        return InfeasibleError(infeasible_message(leanest, needed, self._changes(), self.space.pins.describe()))

    def _changes(self) -> list[str]:
        """The cheapest changes that would fit."""
        changes = []
        space = self.space
        if gpus := self._enough_gpus():
            changes.append(f"{gpus} GPUs")
        if seq_len := self._short_enough():
            changes.append(f"samples of {seq_len} tokens")
        step = {**space.pins.step, "priced": True}
        if not space.priced and _fits(space.program, space.cluster, space.workload, replace(space.pins, step=step)):
            changes.append("offloading to host memory (--priced, if the host has room for it)")
        if space.pins and _fits(space.program, space.cluster, space.workload, Pins()):
            changes.append("leaving out the pins (the planner then also considers sp, recompute and offloading)")
        return changes

    def _enough_gpus(self) -> int | None:
        space = self.space
        gpus = space.cluster.gpus
        while gpus < min(_MOST_GPUS, space.cluster.gpus * 1024):
            gpus *= 2
            if gpus > space.cluster.gpus_per_node and gpus % space.cluster.gpus_per_node:
                continue
            if _fits(space.program, replace(space.cluster, gpus=gpus), space.workload, space.pins):
                return gpus
        return None

    def _short_enough(self) -> int | None:
        space = self.space
        now = space.program.sample.seq_len
        seq_len = 1
        while seq_len * 2 < now:
            seq_len *= 2
        while seq_len >= _SEQ_STEP:
            if _fits(resized(space.program, seq_len), space.cluster, space.workload, space.pins):
                return seq_len
            seq_len //= 2
        return None
