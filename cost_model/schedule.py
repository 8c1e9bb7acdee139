"""The data of one training step as a machine runs it: streams of tasks, in loops.

A `Schedule` is pure data. The planner, `simulate`, the dry run and the passes all price a step through one of these and
one evaluator, `omnicompile.cost_model.timeline.simulate`.
"""

from __future__ import annotations

from dataclasses import dataclass

COMPUTE, INTRA, INTER, COPY = "compute", "intra", "inter", "copy"
STREAMS = (COMPUTE, INTRA, INTER, COPY)


@dataclass(frozen=True, slots=True)
class Dep:
    """Wait for the end of the task `name`.

    name: a task of the same loop, or "loopname.taskname" for the last iteration of that task in an EARLIER loop.
    lag: 0 waits for the task in this iteration (it must be listed earlier), L > 0 for the one L iterations earlier in
    the same loop; in the first L iterations there is nothing to wait for. An earlier loop's task takes no lag.
    """

    name: str
    lag: int = 0


@dataclass(frozen=True, slots=True)
class Task:
    """One kernel, collective or copy, or (with 0 seconds) a join or memory event.

    stream: "compute", "intra" or "inter" (communication inside a node, across nodes) or "copy" (host transfers).
    seconds: duration. kind: what it is accounted as ("gemm", "all_gather", ...). block: the modality block.
    alloc, free: bytes allocated when it starts, and given back when it ends.
    """

    name: str
    stream: str
    seconds: float
    kind: str
    block: str = ""
    after: tuple[Dep, ...] = ()
    alloc: float = 0.0
    free: float = 0.0


@dataclass(frozen=True, slots=True)
class Loop:
    """`count` iterations of `tasks`: the copies of one layer kind, or the micro-steps of a step."""

    name: str
    tasks: tuple[Task, ...]
    count: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """Loops one after the other; within a stream, tasks run in the order in which they are listed.

    A task starts when its stream is free and everything in `after` has ended; loops are not barriers.
    base_bytes: what is allocated throughout (parameters, optimizer state, context).
    """

    loops: tuple[Loop, ...]
    base_bytes: float = 0.0
