"""What the cost model says of a plan: the public `simulate`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from omnicompile.cost_model import timeline
from omnicompile.cost_model.memory import MemoryLayout, Table, overhead_bytes, peak_breakdown
from omnicompile.cost_model.step_model import BlockCost, StepModel
from omnicompile.cost_model.step_numbers import OpNumbers
from omnicompile.cost_model.step_schedule import Step, step_of_blocks
from omnicompile.plan import Plan, Prediction
from omnicompile.planner.rules import check_plan
from omnicompile.program import Phase, Program

COMPUTE_KINDS = ("compute", "recompute", "optimizer")


def simulate(program: Program, plan: Plan, model: StepModel | None = None) -> Plan:
    """`plan` with its prediction. Raises PlanError for a plan that is inconsistent or not executable.

    model: what was computed before for this program and cluster, to save time.
    """
    check_plan(program, plan)
    model = model or StepModel(program, plan.cluster)
    return replace(plan, prediction=predict(plan, model))


def predict(plan: Plan, model: StepModel) -> Prediction:
    """The prediction for a plan that is known to be consistent."""
    blocks = model.plan_blocks(plan)
    step, micro, last = _run(plan, model, blocks)
    seconds = _step_seconds(micro, last, step)
    memory, by_block = memory_of(plan, model, blocks)
    tokens = plan.global_batch * model.program.sample.seq_len
    gpus = plan.cluster.gpus
    peak = model.hardware.peak(model.program.dtype) * gpus * seconds
    return Prediction(
        step_seconds=seconds,
        tokens_per_second_per_gpu=tokens / seconds / gpus,
        mfu=model_flops(model, plan) / peak,
        mfu_paper=paper_flops(model, plan) / peak,
        memory=memory,
        memory_capacity=model.hardware.memory_bytes,
        time=_time_by_kind(micro, last, step),
        block_memory=by_block,
        block_time=_block_seconds(step),
    )


def simulated_seconds(plan: Plan, model: StepModel) -> float:
    """`predict(plan, model).step_seconds` and nothing else."""
    step, micro, last = _run(plan, model, model.plan_blocks(plan))
    return _step_seconds(micro, last, step)


def last_micro_step(plan: Plan, model: StepModel) -> timeline.Timeline:
    """The plan's last micro-step with every task, its optimizer step included."""
    step = step_of_blocks(model.program, model.plan_blocks(plan), plan.accumulation, model.hardware.contention_factor)
    return timeline.simulate(step.last, keep_tasks=True, every_iteration=True)


def _run(
    plan: Plan, model: StepModel, blocks: dict[str, BlockCost]
) -> tuple[Step, timeline.Timeline, timeline.Timeline]:
    step = step_of_blocks(model.program, blocks, plan.accumulation, model.hardware.contention_factor)
    last = timeline.simulate(step.last)
    return step, timeline.simulate(step.micro) if step.accumulation > 1 else last, last


def _step_seconds(micro: timeline.Timeline, last: timeline.Timeline, step: Step) -> float:
    return (step.accumulation - 1) * micro.seconds + last.seconds


def _time_by_kind(micro: timeline.Timeline, last: timeline.Timeline, step: Step) -> dict[str, float]:
    """Seconds of the step by kind; "compute", "recompute", "optimizer" and all of "exposed ..." add up to the step."""
    times: dict[str, float] = {}
    for line, weight in ((micro, step.accumulation - 1), (last, 1)):
        if not weight:
            continue
        off_compute = line.exposed.keys() | line.hidden.keys()
        for kind, seconds in line.by_kind.items():
            if kind in COMPUTE_KINDS and kind not in off_compute:
                times[kind] = times.get(kind, 0.0) + weight * seconds
        for label, parts in (("exposed", line.exposed), ("hidden", line.hidden)):
            for kind, seconds in parts.items():
                times[f"{label} {kind}"] = times.get(f"{label} {kind}", 0.0) + weight * seconds
    return times


def _block_seconds(step: Step) -> dict[str, float]:
    """Compute seconds of the step by block."""
    seconds: dict[str, float] = {}
    for schedule, weight in ((step.micro, step.accumulation - 1), (step.last, 1)):
        for loop in schedule.loops:
            for task in loop.tasks:
                if task.stream == "compute":
                    seconds[task.block] = seconds.get(task.block, 0.0) + weight * loop.count * task.seconds
    return seconds


def block_tables(plan: Plan, model: StepModel, blocks: dict[str, BlockCost]) -> dict[str, Table]:
    """Bytes (kind, moment) of each block."""
    frozen = frozenset(name for name, block in plan.blocks.items() if block.frozen)
    trains = {name: gradient.any for name, gradient in model.gradients(frozen).items()}
    layout = MemoryLayout(model.program, trains)
    return {
        name: layout.work_bytes(name, cost.work) + layout.weights_bytes(name, cost.weights, plan.blocks[name].reshard)
        for name, cost in blocks.items()
    }


def memory_of(plan: Plan, model: StepModel, blocks: dict[str, BlockCost]) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes per GPU at the peak: by kind, and by block (without what belongs to none)."""
    tables = block_tables(plan, model, blocks)
    total = np.sum(list(tables.values()), axis=0)
    column = int(np.argmax(total.sum(axis=0)))
    return peak_breakdown(total, model.hardware), {name: float(t[:, column].sum()) for name, t in tables.items()}


def capacity(model: StepModel) -> float:
    """Bytes that a plan's blocks may use."""
    return model.hardware.memory_bytes - sum(overhead_bytes(model.hardware).values())


def model_flops(model: StepModel, plan: Plan) -> float:
    """FLOPs of one optimizer step that the model itself needs: causal attention counted as half, nothing recomputed,
    of frozen parts only what gradients elsewhere require."""
    frozen = frozenset(name for name, block in plan.blocks.items() if block.frozen)
    gradients = model.gradients(frozen)
    total = 0.0
    for name, numbers in model.numbers.at(1).segments.items():
        gradient = gradients[name]
        wanted = {feed for feed, needed in (("weight", gradient.weight), ("input", gradient.input)) if needed}
        flops = 0.0
        for op in numbers.ops:
            if op.op.phase is Phase.FORWARD or (wanted and (not op.op.feeds or op.op.feeds & wanted)):
                flops += _needed_flops(op)
        total += flops * numbers.segment.count
    return total * plan.global_batch


def _needed_flops(op: OpNumbers) -> float:
    """FLOPs of an op that the model needs: of a fused attention, 2 products forward and 4 backward (its recomputing of
    the scores is not the model's), half of each under a causal mask."""
    shape = op.op.attention
    if shape is None:
        return op.flops
    products = 2.0 * op.pairs * shape.heads * (shape.head_dim + shape.v_head_dim)
    return products * (2.0 if op.op.phase is Phase.BACKWARD else 1.0) * (0.5 if shape.causal else 1.0)


def paper_flops(model: StepModel, plan: Plan) -> float:
    """VeOmni's counting: 6 per active parameter and token, and 12 * sum(s^2) * head_dim * heads per attention layer
    without the causal mask. Embeddings looked up are not counted; every token passes through its own block only."""
    total = 0.0
    for numbers in model.numbers.at(1).segments.values():
        segment = numbers.segment
        for op in numbers.ops:
            if op.op.phase is Phase.FORWARD:
                total += 3 * op.flops * segment.count
    return total * plan.global_batch
