"""A plan's step from inside: what each block communicates and holds, and the tasks of the last micro-step."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from omnicompile.cost_model import timeline
from omnicompile.cost_model.schedule import COMPUTE, Loop, Schedule, Task
from omnicompile.cost_model.step_model import StepModel
from omnicompile.picture import Flow, Picture, StepTask, Stretch, Transfer
from omnicompile.plan import Plan
from omnicompile.planner.predict import memory_by_block, slowest_stage
from omnicompile.program import Program

_GATHER = re.compile(r"gather\d+")
_PURPOSES = (
    (_GATHER, "parameters"),
    (re.compile(r"reduce\d+"), "gradients"),
    (re.compile(r"replicas\d+"), "gradients, replicas"),
    (re.compile(r"edge\d+"), "features"),
    (re.compile(r"offload|fetch"), "activations"),
    (re.compile(r"gradients out|weights in"), "optimizer"),
    (re.compile(r"work\d+"), "activations"),
)
_SEPARATOR = "\x1f"


def picture_of(plan: Plan, program: Program, model: StepModel | None = None) -> Picture:
    """The picture of a plan that is priced; of a pipeline, that of its slowest stage (the memory of its fullest).

    model: what was computed before for this program and cluster, to save time.
    """
    model = model or StepModel(program, plan.cluster)
    stage, step = slowest_stage(plan, model)
    micro, last = _gathers_of_their_blocks(step.micro), _gathers_of_their_blocks(step.last)
    line = timeline.simulate(last, keep_tasks=True, every_iteration=True)
    tasks = tuple(StepTask(n, s, kind, block, a, b) for n, s, a, b, kind, block in line.tasks if b > a)
    forwards = sum(run.count for run in stage.runs)
    return Picture(
        transfers=_transfers([(micro, step.accumulation - 1), (last, 1)]),
        flows=_flows(plan, program, model),
        memory=memory_by_block(plan, model),
        tasks=tasks,
        stretches=_stretches(line.tasks, forwards, line.seconds),
        seconds=line.seconds,
    )


def _gathers_of_their_blocks(schedule: Schedule) -> Schedule:
    """Parameters are gathered while the layer before is at work: such tasks are the next layer's, maybe another
    block's."""
    loops: list[Loop] = []
    block = ""
    for loop in reversed(schedule.loops):
        own = tuple(
            replace(task, block=block or task.block) if _GATHER.fullmatch(task.name) else task for task in loop.tasks
        )
        loops.append(replace(loop, tasks=own))
        block = next((task.block for task in loop.tasks if task.name == "begin"), block)
    return Schedule(tuple(reversed(loops)), schedule.base_bytes)


def _transfers(parts: list[tuple[Schedule, int]]) -> tuple[Transfer, ...]:
    """By block, kind, purpose and stream; over all micro-steps, given with their number."""
    exposed: dict[str, float] = {}
    hidden: dict[str, float] = {}
    counts: dict[str, int] = {}
    for schedule, weight in parts:
        if not weight:
            continue
        told = Schedule(tuple(_told_apart(loop) for loop in schedule.loops), schedule.base_bytes)
        line = timeline.simulate(told)
        for into, found in ((exposed, line.exposed), (hidden, line.hidden)):
            for key, seconds in found.items():
                into[key] = into.get(key, 0.0) + weight * seconds
        for loop in told.loops:
            for task in loop.tasks:
                if task.stream != COMPUTE and task.seconds:
                    counts[task.kind] = counts.get(task.kind, 0) + weight * loop.count
    transfers: list[Transfer] = []
    for key, count in counts.items():
        block, kind, purpose, stream = key.split(_SEPARATOR)
        seen = exposed.get(key, 0.0), hidden.get(key, 0.0)
        transfers.append(Transfer(block, kind, purpose, stream, count, *seen))
    return tuple(transfers)


def _told_apart(loop: Loop) -> Loop:
    """The loop with kinds that also say the block, the purpose and the stream, so that the evaluator counts by them."""
    return replace(loop, tasks=tuple(task if task.stream == COMPUTE else _named(task) for task in loop.tasks))


def _named(task: Task) -> Task:
    return replace(task, kind=_SEPARATOR.join((task.block, task.kind, _purpose(task.name), task.stream)))


def _purpose(name: str) -> str:
    return next((words for pattern, words in _PURPOSES if pattern.fullmatch(name)), "")


def _flows(plan: Plan, program: Program, model: StepModel) -> tuple[Flow, ...]:
    sizes = model.numbers.at(plan.micro_batch).edges
    return tuple(Flow(edge.source, edge.target, size) for edge, size in zip(program.edges, sizes))


def _stretches(
    tasks: list[tuple[str, str, float, float, str, str]], forwards: int, seconds: float
) -> tuple[Stretch, ...]:
    """Neighbours of one phase and block as one stretch; each lasts until the next begins."""
    starts: list[tuple[float, str, str]] = []
    for start, phase, block in _begins(tasks, forwards):
        if not starts or starts[-1][1:] != (phase, block):
            starts.append((start, phase, block))
    ends = [start for start, _, _ in starts[1:]] + [seconds]
    return tuple(Stretch(phase, block, start, end) for (start, phase, block), end in zip(starts, ends) if end > start)


def _begins(tasks: list[tuple[str, str, float, float, str, str]], forwards: int) -> Iterator[tuple[float, str, str]]:
    """(seconds, phase, block) of every layer's begin, of which the first `forwards` are forward, and of the update."""
    begun = 0
    for name, _, start, _, _, block in tasks:
        if name == "begin":
            begun += 1
            yield start, "forward" if begun <= forwards else "backward", block
        elif name in ("replicas0", "update", "gradients out"):
            yield start, "update", ""
            return
