"""The optimum by trying everything, through the public `simulate` alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from omnicompile.cluster import Cluster
from omnicompile.errors import PlanError
from omnicompile.plan import BlockPlan, Layout, LossHead, Mesh, Plan, Sharding
from omnicompile.planner.predict import simulate
from omnicompile.program import Program, Recompute
from omnicompile.workload import Workload


def factors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def block_plans(sp: int, ep: int, expert: bool, frozen: bool) -> list[BlockPlan]:
    layouts = [(Layout.BATCH, 1)] if sp == 1 else [(Layout.SEQUENCE, sp), (Layout.IMAGES, sp), (Layout.REPLICATED, 1)]
    return [
        BlockPlan(sharding, layout, own_sp, ep if expert else 1, recompute, offload, True, frozen)
        for sharding in Sharding
        for layout, own_sp in layouts
        for recompute in Recompute
        for offload in (False, True)
    ]


def every_plan(program: Program, cluster: Cluster, workload: Workload) -> Iterator[Plan]:
    """Every combination of every field; many are refused by `simulate`."""
    names = [b.name for b in program.blocks]
    expert = {n: any(p.expert for s in program.block_segments(n) for p in s.params) for n in names}
    samples = workload.global_batch or cluster.gpus
    degrees = factors(cluster.gpus)
    for sp, replicas, ep in itertools.product(degrees, degrees, degrees if program.has_experts else [1]):
        if cluster.gpus % (sp * replicas):
            continue
        mesh = Mesh(dp_replicate=replicas, dp_shard=cluster.gpus // sp // replicas, sp=sp, ep=ep)
        blocks = [block_plans(sp, ep, expert[n], n in workload.freeze) for n in names]
        for micro_batch, accumulation in itertools.product(factors(samples), factors(samples)):
            if micro_batch * accumulation * mesh.data_ranks != samples:
                continue
            for choice in itertools.product(*blocks, LossHead, (False, True)):
                yield Plan(
                    program.source, cluster, workload, mesh, dict(zip(names, choice[:-2])), micro_batch, accumulation,
                    choice[-2], choice[-1],
                )  # fmt: skip


def brute_force(program: Program, cluster: Cluster, workload: Workload, simulate_one=simulate) -> float | None:
    """Seconds of the fastest plan that fits; None if none fits."""
    best: float | None = None
    for plan in every_plan(program, cluster, workload):
        try:
            prediction = simulate_one(program, plan).prediction
        except PlanError:
            continue
        assert prediction is not None
        if prediction.fits and (best is None or prediction.step_seconds < best):
            best = prediction.step_seconds
    return best
