"""A plan at other sizes, planned anew or with the same choices: longer and shorter samples, more and fewer GPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from omnicompile.cluster import Cluster
from omnicompile.errors import OmniCompileError, PlanError
from omnicompile.picture import Curve, Point
from omnicompile.plan import Plan
from omnicompile.planner.api import Progress, Search, resized, silent
from omnicompile.planner.pins import parse_pins
from omnicompile.planner.predict import predict, simulate
from omnicompile.program import Program
from omnicompile.workload import Workload

POINTS, FEWER_POINTS = 5, 3
MANY_PLANS = 1_000_000
LEAST_TOKENS = 256
FOLLOW_THE_GPUS = ("mesh.dp_replicate", "mesh.dp_shard", "step.accumulation")
"""Pins that no plan for another number of GPUs could keep."""


@dataclass(frozen=True)
class Place:
    """Where to plan: the program with the sample's size, the cluster and the workload."""

    program: Program
    cluster: Cluster
    workload: Workload


At = Callable[[Place], Plan]
"""The plan at a place, priced; it need not fit. Raises PlanError if there is none."""


def sweep(
    plan: Plan,
    program: Program,
    pins: Mapping[str, str] | None = None,
    progress: Progress = silent,
    points: int = POINTS,
) -> tuple[Curve, Curve]:
    """Over sample lengths and over GPU counts: the choices of `plan` kept, and the fastest plan of each size. With the
    GPUs grows dp_replicate, where it is above 1, or dp_shard.

    pins: what the search keeps, but for what follows from the number of GPUs where that changes; None: no search. Where
    nothing fits, the plan that needs the least memory stands. points: at most, of each curve.
    """
    here = Place(program, plan.cluster, plan.workload)
    tokens, gpus = program.sample.seq_len, plan.cluster.gpus
    lengths = {value: _longer(here, value) for value in sample_lengths(program, points)}
    counts = {value: _larger(here, value) for value in gpu_counts(plan.cluster, points)}

    def best(place: Place) -> Plan:
        progress(f"planning for {place.program.sample.seq_len:,} tokens on {place.cluster.gpus:,} GPUs")
        kept = dict(pins or {})
        if place.cluster.gpus != gpus:
            kept = {key: value for key, value in kept.items() if key not in FOLLOW_THE_GPUS}
        return _best(place, kept, plan.model)

    def curve(axis: str, now: int, places: Mapping[int, Place]) -> Curve:
        planned = () if pins is None else _points(plan, now, places, best)
        return Curve(axis, now, planned, _points(plan, now, places, lambda place: _scaled(plan, place)))

    return curve("seq_len", tokens, lengths), curve("gpus", gpus, counts)


def _points(plan: Plan, now: int, places: Mapping[int, Place], at: At) -> tuple[Point, ...]:
    return tuple(Point(value, plan) if value == now else _point(value, place, at) for value, place in places.items())


def _point(value: int, place: Place, at: At) -> Point:
    try:
        plan = at(place)
    except OmniCompileError as error:
        return Point(value, None, str(error))
    return Point(value, plan, "" if plan.prediction is not None and plan.prediction.fits else "does not fit")


def _longer(place: Place, seq_len: int) -> Place:
    program, workload = resized(place.program, seq_len), replace(place.workload, seq_len=seq_len)
    return replace(place, program=program, workload=workload)


def _larger(place: Place, gpus: int) -> Place:
    return replace(place, cluster=replace(place.cluster, gpus=gpus))


def affordable_points(explored: int) -> int:
    """How many points a curve may have, so that a page takes seconds: fewer where each is searched for among many."""
    return FEWER_POINTS if explored > MANY_PLANS else POINTS


def sample_lengths(program: Program, points: int = POINTS) -> tuple[int, ...]:
    """The sample's length, halved and doubled: as long as what stands in it for images and audio has room."""
    sample = program.sample
    least = max(LEAST_TOKENS, sample.images * sample.tokens_per_image + sample.clips * sample.tokens_per_clip)
    return _around(sample.seq_len, points, lambda value: value >= least)


def gpu_counts(cluster: Cluster, points: int = POINTS) -> tuple[int, ...]:
    """The number of GPUs, halved and doubled, as parts of a node or whole nodes."""
    node = cluster.gpus_per_node
    return _around(cluster.gpus, points, lambda value: node % value == 0 if value < node else value % node == 0)


def _around(now: int, points: int, allowed: Callable[[int], bool]) -> tuple[int, ...]:
    """Up to `points` values: at most half of them below `now`, by halving as far as that is whole and allowed."""
    below: list[int] = []
    value = now
    while len(below) < points // 2 and value % 2 == 0 and allowed(value // 2):
        value //= 2
        below.insert(0, value)
    above = [now * 2**power for power in range(1, points - len(below))]
    return (*below, now, *(value for value in above if allowed(value)))


def _best(place: Place, pins: Mapping[str, str], name: str) -> Plan:
    search = Search(place.program, place.cluster, place.workload, parse_pins(pins, place.program), name)
    if found := search.solver.solve(1).best:
        return found[0]
    leanest = search.solver.leanest()
    if leanest is None:
        raise PlanError("nothing fits")
    return replace(leanest[0], prediction=predict(leanest[0], search.solver.model))


def _scaled(plan: Plan, place: Place) -> Plan:
    """`plan` on another cluster and sample: the same choices, priced. Raises PlanError where they cannot be kept."""
    mesh, gpus = plan.mesh, place.cluster.gpus
    grows = "dp_replicate" if mesh.dp_replicate > 1 else "dp_shard"
    others = mesh.world // getattr(mesh, grows)
    if gpus % others:
        raise PlanError(f"the other degrees of the mesh, {others} in all, do not divide {gpus} GPUs")
    mesh = replace(mesh, **{grows: gpus // others})
    samples = place.workload.global_batch or plan.global_batch * gpus // plan.cluster.gpus
    accumulation = max(1, samples // (plan.micro_batch * mesh.data_ranks))
    moved = replace(
        plan, cluster=place.cluster, workload=place.workload, mesh=mesh, accumulation=accumulation, notes=()
    )
    return simulate(place.program, moved)
