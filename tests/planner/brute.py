"""The optimum by trying everything, through the public `simulate` alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from synthetic import random_program

from omnicompile.cluster import Cluster
from omnicompile.cost_model.step_model import StepModel
from omnicompile.errors import PlanError
from omnicompile.plan import BlockPlan, Layout, LossHead, Mesh, Overlap, Plan, Sharding
from omnicompile.planner.predict import simulate
from omnicompile.program import Program, Recompute
from omnicompile.workload import Workload

Pins = dict[str, str]
SEARCHED = tuple(s for s in Sharding if s is not Sharding.ZERO1)  # that one is priced only


@dataclass(frozen=True)
class Case:
    program: Program
    cluster: Cluster
    workload: Workload
    pins: Pins


def factors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def block_plans(sp: int, ep: int, frozen: bool, pins: Pins) -> list[BlockPlan]:
    layouts = [(Layout.BATCH, 1), (Layout.SEQUENCE, sp), (Layout.IMAGES, sp), (Layout.REPLICATED, 1)]
    plans = [
        BlockPlan(sharding, layout, own_sp, ep, recompute, offload, True, frozen)
        for sharding, (layout, own_sp) in itertools.product(SEARCHED, layouts)
        for recompute, offload in itertools.product(Recompute, (False, True))
    ]
    return [p for p in plans if all(str(vars(p)[name]).lower() == value for name, value in pins.items())]


def of(pins: Pins, owner: str) -> Pins:
    """Pins of one owner ("" for the step) by field name."""
    return {k.rpartition(".")[2]: v for k, v in pins.items() if k.rpartition(".")[0] == owner}


def every_plan(case: Case) -> Iterator[Plan]:
    """Every combination of every field that agrees with the pins; `simulate` refuses most."""
    program, cluster, workload = case.program, case.cluster, case.workload
    names = [b.name for b in program.blocks]
    expert = {n: any(p.expert for s in program.block_segments(n) for p in s.params) for n in names}
    samples = workload.global_batch or cluster.gpus
    degrees, step = factors(cluster.gpus), of(case.pins, "")
    for sp, replicas, ep in itertools.product(degrees, degrees, degrees if program.has_experts else [1]):
        if cluster.gpus % (sp * replicas):
            continue
        mesh = Mesh(dp_replicate=replicas, dp_shard=cluster.gpus // sp // replicas, sp=sp, ep=ep)
        if any(str(vars(mesh)[name]) != value for name, value in of(case.pins, "mesh").items()):
            continue
        blocks = [block_plans(sp, ep if expert[n] else 1, n in workload.freeze, of(case.pins, n)) for n in names]
        for micro_batch in factors(samples):
            accumulation = samples // (micro_batch * mesh.data_ranks)
            for *chosen, head, offload, inside in itertools.product(*blocks, LossHead, (False, True), (False, True)):
                plan = Plan(
                    program.source, cluster, workload, mesh, dict(zip(names, chosen)), micro_batch, accumulation, head,
                    offload, overlap=Overlap(replica_sums=inside),
                )  # fmt: skip
                if all(str(vars(plan)[name]).lower() == value for name, value in step.items()):
                    yield plan


def brute_force(case: Case) -> float | None:
    """Seconds of the fastest plan that fits; None if none fits."""
    model = StepModel(case.program, case.cluster)
    best: float | None = None
    for plan in every_plan(case):
        try:
            prediction = simulate(case.program, plan, model).prediction
        except PlanError:
            continue
        assert prediction is not None
        if prediction.fits and (best is None or prediction.step_seconds < best):
            best = prediction.step_seconds
    return best


def random_case(seed: int, limit: int) -> Case:
    """A random program, cluster, workload and pins; pins are added until at most `limit` plans agree with them."""
    rng = random.Random(seed)
    program = random_program(seed)
    cluster = Cluster(rng.choice([1, 2, 4, 4]), rng.choice(["h100", "a100"]), gpus_per_node=rng.choice([2, 4]))
    if cluster.gpus_per_node > cluster.gpus:
        cluster = Cluster(cluster.gpus, cluster.gpu, cluster.gpus)
    freeze = (program.blocks[0].name,) if len(program.blocks) > 1 and rng.random() < 0.4 else ()
    workload = Workload(program.sample.seq_len, global_batch=rng.choice([None, cluster.gpus * 2]), freeze=freeze)
    case = Case(program, cluster, workload, {})
    choices = [f"{b.name}.{key}" for b in program.blocks for key in ("sharding", "recompute", "offload")]
    choices += ["loss_head", "offload_optimizer", "mesh.sp"]
    rng.shuffle(choices)
    choices = ["mesh.dp_replicate", "mesh.ep", "micro_batch", *choices]
    while choices and sum(1 for _ in itertools.islice(every_plan(case), limit + 1)) > limit:
        case = Case(program, cluster, workload, case.pins | random_pin(choices.pop(), cluster, rng))
    return case


def random_pin(key: str, cluster: Cluster, rng: random.Random) -> Pins:
    values: dict[str, list[str]] = {
        "sharding": [str(s) for s in SEARCHED],
        "recompute": [str(r) for r in Recompute],
        "loss_head": [str(h) for h in LossHead],
        "offload": ["true", "false"],
        "offload_optimizer": ["true", "false"],
    }
    name = key.rpartition(".")[2]
    return {key: rng.choice(values.get(name, ["1", "1", "2"] if cluster.gpus > 1 else ["1"]))}
