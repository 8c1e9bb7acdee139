"""One rank of a plan at full size, without a GPU and without weights: its real graph, its memory and its time.

The forward is captured and lowered, and the step graph (forward, loss, backward) traced on fake tensors of the rank's
own shapes, with its collectives as they are scheduled for training. It is cut into kernels as the backend "inductor"
compiles it. Memory is the peak of a liveness walk over the kernels. Time is a simulation of kernels and collectives in
the graph's order, each stream in order. Nothing of the planner is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, fx, nn

from omnicompile.cluster import Cluster
from omnicompile.cost_model.schedule import COMPUTE, Loop, Schedule, Task
from omnicompile.cost_model.step_model import OPTIMIZER_BYTES
from omnicompile.cost_model.timeline import Timeline, simulate
from omnicompile.lowering.full_size import full_program
from omnicompile.lowering.step_graph import FIRST, LAST, ONLY, finish_step, schedule_step
from omnicompile.lowering.step_prices import Kernel, Prices, compiled, counted, kernels
from omnicompile.lowering.tiny import Batch
from omnicompile.passes import lower_forward
from omnicompile.passes.liveness import balanced_rows, peak_bytes, tensor_bytes
from omnicompile.passes.rank_program import RankProgram, copied
from omnicompile.plan import Plan

_ADAM_STATES = 2


@dataclass(frozen=True)
class DryRun:
    """Of one rank. peak_bytes: parameters and gradients included, without optimizer_bytes (of Adam, on the device).
    holders: what is alive at the peak beside parameters, by node, in bytes. collectives: of the last micro-step,
    (kind, axes) -> (number, bytes). timeline: of a micro-step; last: of the last one. replica_seconds, update_seconds:
    after it, the sum of gradients over replicas and the optimizer. nodes, kernels, peak: of the last one."""

    nodes: int
    kernels: int
    peak_bytes: int
    peak_at: str
    holders: dict[str, int]
    parameter_bytes: int
    optimizer_bytes: int
    collectives: dict[tuple[str, str], tuple[int, int]]
    timeline: Timeline
    last: Timeline
    replica_seconds: float
    update_seconds: float

    @property
    def seconds(self) -> float:
        """Of one micro-step."""
        return self.timeline.seconds

    def step_seconds(self, accumulation: int) -> float:
        """Of an optimizer step."""
        return (accumulation - 1) * self.seconds + self.last.seconds + self.replica_seconds + self.update_seconds


def dry_run(model: nn.Module, batch: Batch, plan: Plan) -> DryRun:
    """model: on the meta device. batch: as `full_batch` makes it. Raises what capturing and lowering raise."""
    full = full_program(model, batch, plan)
    return dry_run_program(lower_forward(full.before), full.host, plan.cluster, plan.accumulation)


def dry_run_program(
    program: RankProgram, host: Mapping[str, Tensor], cluster: Cluster, accumulation: int = 1
) -> DryRun:
    """program: lowered, groups not bound. host: metadata by placeholder, for the lengths of attention's segments.
    accumulation: micro-steps, each but the first adding to the gradients of those before it."""
    scheduled = schedule_step(program)
    micro = replace(scheduled, gm=copied(scheduled.gm)) if accumulation > 1 else scheduled
    step = finish_step(program, scheduled, LAST if accumulation > 1 else ONLY)
    gm = step.gm
    rows = balanced_rows(gm.graph)
    found, prices = kernels(gm), Prices(program.mesh, cluster, host, rows)
    peak = peak_bytes(gm, rows, compiled(gm), in_flight=True, staged=prices.staged(gm.graph))
    states = {n.name: tensor_bytes(n.meta["val"], rows) for n in gm.graph.find_nodes(op="placeholder")}
    trained = {name: _master_bytes(program, name) for name, spec in program.params.items() if spec.trainable}
    last = _timeline(gm, found, prices)
    timeline = last
    if accumulation > 1:
        micro = finish_step(program, micro, FIRST)
        timeline = _timeline(micro.gm, kernels(micro.gm), prices)
    return DryRun(
        nodes=len(gm.graph.nodes),
        kernels=len(found),
        peak_bytes=peak.total,
        peak_at=peak.node,
        holders=peak.holders,
        parameter_bytes=sum(states[name] for name in program.params),
        optimizer_bytes=0 if program.compute_weights else _ADAM_STATES * sum(trained.values()),
        collectives=counted(gm.graph, rows),
        timeline=timeline,
        last=last,
        replica_seconds=_replicas(program, {n: b for n, b in trained.items() if n not in step.summed}, prices),
        update_seconds=_update(program, trained, prices),
    )


def _timeline(gm: fx.GraphModule, found: list[Kernel], prices: Prices) -> Timeline:
    tasks = _contending(prices.tasks(gm.graph, found), gm.graph, prices)
    return simulate(Schedule((Loop("step", tuple(tasks), 1),)))


def _contending(tasks: list[Task], graph: fx.Graph, prices: Prices) -> list[Task]:
    """Compute slowed by the collectives that run beside it: those not waited for at once."""
    names = {node.name for node in graph.nodes if prices.is_prefetch(node)}
    beside = sum(task.seconds for task in tasks if task.name in names)
    compute = sum(task.seconds for task in tasks if task.stream == COMPUTE)
    slow = 1.0 + prices.hw.contention_factor * min(1.0, beside / compute) if compute else 1.0
    return [
        Task(t.name, t.stream, t.seconds * slow, t.kind, t.block, t.after) if t.stream == COMPUTE else t for t in tasks
    ]


def _master_bytes(program: RankProgram, name: str) -> int:
    """Of a parameter's shard as the optimizer has it, and of its gradient."""
    spec = program.params[name]
    return math.prod(spec.local_shape(program.mesh)) * spec.dtype.itemsize


def _update(program: RankProgram, trained: Mapping[str, int], prices: Prices) -> float:
    """Seconds of the optimizer. On the host it runs as gradients come out and weights go in, as the planner has it."""
    update = prices.memory(sum(trained.values()) / 4 * OPTIMIZER_BYTES)
    return 2 * max(update, prices.host_copy(sum(trained.values()))) if program.compute_weights else update


def _replicas(program: RankProgram, trained: Mapping[str, int], prices: Prices) -> float:
    """The runtime sums gradients over equal shards once the backward is over, all in one all-reduce for each group."""
    sums: dict[str, int] = {}
    for name, nbytes in trained.items():
        for axes in program.params[name].reduce_axes:
            sums[axes] = sums.get(axes, 0) + nbytes
    return sum(prices.all_reduce(axes, nbytes) for axes, nbytes in sums.items())
