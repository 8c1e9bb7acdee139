"""What the cost model says of a plan: the public `simulate`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from omnicompile.cost_model import pipeline, timeline
from omnicompile.cost_model.memory import ACTIVATION_ROW, KINDS, MemoryLayout, Table, overhead_bytes, peak_breakdown
from omnicompile.cost_model.step_layout import Gradient, block_groups
from omnicompile.cost_model.step_model import BlockCost, StepModel
from omnicompile.cost_model.step_schedule import Step, step_of_blocks
from omnicompile.plan import BlockPlan, Plan, Prediction
from omnicompile.planner.rules import check_plan
from omnicompile.program import Op, Phase, Program

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
    ran = _run_stages(plan, model)
    paced = _pace(plan, model, ran)
    slowest, seconds = ran[paced.slowest], paced.seconds
    memory, by_block = max((stage.memory(plan) for stage in ran), key=lambda found: sum(found[0].values()))
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
        time=_time_by_kind(slowest.micro, slowest.last, slowest.step) | _waiting(paced),
        block_memory=by_block,
        block_time=_most([_block_seconds(stage.step) for stage in ran]),
    )


def simulated_seconds(plan: Plan, model: StepModel) -> float:
    """`predict(plan, model).step_seconds` and nothing else."""
    return _pace(plan, model, _run_stages(plan, model)).seconds


def last_micro_step(plan: Plan, model: StepModel) -> timeline.Timeline:
    """The last micro-step with every task, its optimizer step included; of a pipeline, of its slowest stage."""
    return timeline.simulate(slowest_stage(plan, model)[1].last, keep_tasks=True, every_iteration=True)


def slowest_stage(plan: Plan, model: StepModel) -> tuple[Program, Step]:
    """The stage of the pipeline that paces the others (without one: the whole program), and its step."""
    ran = _run_stages(plan, model)
    slowest = ran[_pace(plan, model, ran).slowest]
    return slowest.model.program, slowest.step


def memory_by_block(plan: Plan, model: StepModel) -> dict[str, dict[str, float]]:
    """Bytes at the peak by block and kind, on the stage that needs most."""
    tables = [_tables_in_flight(plan, ran.model, ran.blocks, ran.in_flight) for ran in _run_stages(plan, model)]
    fullest = max(tables, key=lambda found: float(np.sum(list(found.values()), axis=0).sum(axis=0).max()))
    column = int(np.argmax(np.sum(list(fullest.values()), axis=0).sum(axis=0)))
    return {name: dict(zip(KINDS, map(float, table[:, column]))) for name, table in fullest.items()}


@dataclass(frozen=True)
class _Ran:
    """One stage of the pipeline (without one: the whole program), simulated."""

    model: StepModel
    blocks: dict[str, BlockCost]
    in_flight: float
    step: Step
    micro: timeline.Timeline
    last: timeline.Timeline

    def memory(self, plan: Plan) -> tuple[dict[str, float], dict[str, float]]:
        return memory_of(plan, self.model, self.blocks, self.in_flight)


def _run_stages(plan: Plan, model: StepModel) -> list[_Ran]:
    if plan.mesh.pp == 1:
        return [_run(plan, model, 1.0)]
    ran: dict[tuple[object, ...], _Ran] = {}
    found = []
    for stage in pipeline.stages(model.program, plan):
        runs = stage.program.runs
        if runs not in model.parts:
            model.parts[runs] = StepModel(stage.program, model.cluster, model.hardware, model)
        if runs not in ran:
            ran[runs] = _run(plan, model.parts[runs], stage.in_flight)
        found.append(replace(ran[runs], in_flight=stage.in_flight))
    return found


def _most(parts: list[dict[str, float]]) -> dict[str, float]:
    """The largest of each value: what the rank of a pipeline that has most of a block has of it."""
    return {name: max(part.get(name, 0.0) for part in parts) for name in dict.fromkeys(k for p in parts for k in p)}


def _run(plan: Plan, model: StepModel, in_flight: float) -> _Ran:
    blocks = model.plan_blocks(plan)
    step = step_of_blocks(model.program, blocks, plan.accumulation, model.hardware.contention_factor)
    last = timeline.simulate(step.last)
    micro = timeline.simulate(step.micro) if step.accumulation > 1 else last
    return _Ran(model, blocks, in_flight, step, micro, last)


def _pace(plan: Plan, model: StepModel, ran: list[_Ran]) -> pipeline.Pace:
    if len(ran) == 1:
        return pipeline.Pace(0, (ran[0].step.accumulation - 1) * ran[0].micro.seconds + ran[0].last.seconds, 0.0, 0.0)
    micro, last = [stage.micro.seconds for stage in ran], [stage.last.seconds for stage in ran]
    return pipeline.pace(micro, last, plan.accumulation, plan.stack.pipeline_chunks, _sending(plan, model))


def _sending(plan: Plan, model: StepModel) -> float:
    """Seconds to pass one micro-batch's activations from a stage of the pipeline to the next."""
    mesh = plan.mesh
    numbers = model.numbers.at(plan.micro_batch).segments
    widest = max(n.output_bytes for n in numbers.values() if n.segment.role == "layer")
    ranks = mesh.sp * mesh.cp * mesh.tp  # Megatron-LM scatters what is whole before it sends, and gathers it again
    stages = block_groups(mesh, BlockPlan(), plan.cluster.gpus_per_node).stages
    return sum(piece.seconds for piece in model.prices(plan.stack).collective("send_recv", widest / ranks, stages))


def _waiting(paced: pipeline.Pace) -> dict[str, float]:
    waits = {"exposed pipeline_bubble": paced.bubble, "exposed pipeline_send": paced.passing}
    return {kind: seconds for kind, seconds in waits.items() if seconds}


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


def memory_of(
    plan: Plan, model: StepModel, blocks: dict[str, BlockCost], in_flight: float = 1.0
) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes per GPU at the peak: by kind, and by block (without what belongs to none). in_flight: micro-batches whose
    activations are kept at once."""
    tables = _tables_in_flight(plan, model, blocks, in_flight)
    total = np.sum(list(tables.values()), axis=0)
    column = int(np.argmax(total.sum(axis=0)))
    return peak_breakdown(total, model.hardware), {name: float(t[:, column].sum()) for name, t in tables.items()}


def _tables_in_flight(plan: Plan, model: StepModel, blocks: dict[str, BlockCost], in_flight: float) -> dict[str, Table]:
    """`block_tables` with the activations of the other micro-batches in flight."""
    tables = block_tables(plan, model, blocks)
    if in_flight > 1:
        for name, table in tables.items():
            units = blocks[name].work.units
            kept = sum(units[run.segment].saved * run.count for run in model.program.runs if run.segment in units)
            table[ACTIVATION_ROW] += (in_flight - 1) * kept
    return tables


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
        needed = (op for op in numbers.ops if is_needed(op.op, gradients[name]))
        total += sum(needed_flops(op.op, op.flops, op.pairs) for op in needed) * numbers.segment.count
    return total * plan.global_batch


def is_needed(op: Op, gradient: Gradient) -> bool:
    """Whether a step runs `op` where `gradient` is what the backward of its segment must produce."""
    wanted = {feed for feed, needed in (("weight", gradient.weight), ("input", gradient.input)) if needed}
    return op.phase is Phase.FORWARD or bool(wanted and (not op.feeds or op.feeds & wanted))


def needed_flops(op: Op, flops: Any, pairs: Any) -> Any:
    """FLOPs of an op that the model needs: of a fused attention, 2 products forward and 4 backward (its recomputing of
    the scores is not the model's), half of each under a causal mask. flops, pairs: its own, numbers or expressions."""
    shape = op.attention
    if shape is None:
        return flops
    products = 2.0 * pairs * shape.heads * (shape.head_dim + shape.v_head_dim)
    return products * (2.0 if op.phase is Phase.BACKWARD else 1.0) * (0.5 if shape.causal else 1.0)


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
