"""Pipeline parallelism: the stages of a program, and the time and memory of 1F1B from those of one micro-step a stage.

    stage 0   F0 F1 F2 F3 .. .. B0 F4 B1 F5 ...          m micro-batches, p stages, v chunks a stage (interleaved)
    stage 1      F0 F1 F2 .. B0 F3 B1 F4 ...             step = m * T + (p - 1) / v * T for equal stages of T seconds

(Narayanan et al. 2021, "Efficient large-scale language model training on GPU clusters using Megatron-LM", sections 2.2
and 2.3.) Each stage is a program of its own, priced by the same schedule as a whole one; the slowest
stage paces the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from omnicompile.plan import Plan
from omnicompile.program import Program, Run, Segment


@dataclass(frozen=True)
class Stage:
    """index: position in the pipeline. in_flight: micro-batches (of all its layers) whose activations it holds at once,
    the one at work included."""

    index: int
    program: Program
    in_flight: float


def stages(program: Program, plan: Plan) -> tuple[Stage, ...]:
    """The stages of a plan, in order."""
    count, chunks = plan.mesh.pp, plan.stack.pipeline_chunks
    layers = _deal(_layer_count(program), count, chunks)
    runs = _walk(program, layers)
    return tuple(
        Stage(i, _part(program, runs[i]), _in_flight(i, count, chunks, plan.accumulation)) for i in range(count)
    )


def _layer_count(program: Program) -> int:
    return sum(run.count for run in program.runs if program.segment(run.segment).role == "layer")


def _deal(layers: int, count: int, chunks: int) -> list[int]:
    """Layers of each stage. If they do not divide and two more would, the first and last chunk have one less each
    (beside the embedding and the loss head); otherwise the first stages have one more."""
    parts = count * chunks
    if layers % parts and (layers + 2) % parts == 0 and count > 1:
        each = [(layers + 2) // count] * count
        each[0] -= 1
        each[-1] -= 1
        return each
    return [layers // count + (i < layers % count) for i in range(count)]


def _walk(program: Program, layers: list[int]) -> list[list[Run]]:
    """Runs of each stage: what comes before the last layer stays with the layers around it."""
    runs: list[list[Run]] = [[] for _ in layers]
    stage, room = 0, layers[0]
    for run in program.runs:
        if program.segment(run.segment).role != "layer":
            runs[stage].append(run)
            continue
        left = run.count
        while left:
            while not room and stage + 1 < len(layers):
                stage, room = stage + 1, layers[stage + 1]
            taken = min(left, room) if room else left
            runs[stage].append(Run(run.segment, taken))
            left, room = left - taken, room - taken
    return runs


def _part(program: Program, runs: list[Run]) -> Program:
    """The program of one stage: its runs, segments as often as they occur in it, parameters that it has to hold."""
    counts: dict[str, int] = {}
    for run in runs:
        counts[run.segment] = counts.get(run.segment, 0) + run.count
    kept = [program.segment(name) for name in counts]
    defined = {param.name for segment in kept for param in segment.params if not param.tied_to}
    segments = tuple(_own(segment, counts[segment.name], defined) for segment in kept)
    names = {segment.name for segment in segments}
    blocks = tuple(
        replace(block, segments=tuple(name for name in block.segments if name in names)) for block in program.blocks
    )
    return replace(program, blocks=blocks, segments=segments, runs=tuple(runs))


def _own(segment: Segment, count: int, defined: set[str]) -> Segment:
    """`count` instances; parameters tied to those of another stage are copies here."""
    params = tuple(
        replace(param, tied_to="") if param.tied_to and param.tied_to not in defined else param
        for param in segment.params
    )
    return replace(segment, count=count, params=params)


def _in_flight(index: int, count: int, chunks: int, micro_steps: int) -> float:
    """1F1B: as many micro-batches as there are stages from here on. Interleaved: (chunks - 1) * count more chunks, and
    two for each stage that follows, of which each is a part of the stage's layers."""
    if chunks == 1:
        return float(min(micro_steps, count - index))
    warm_up = (chunks - 1) * count + 2 * (count - index - 1) + 1
    return min(micro_steps * chunks, warm_up) / chunks


@dataclass(frozen=True)
class Pace:
    """Seconds of a pipelined step. slowest: the stage that paces it, which works for `work` seconds; bubble: it waits
    for others while the pipeline fills and drains; passing: it sends to and receives from its neighbours."""

    slowest: int
    work: float
    bubble: float
    passing: float

    @property
    def seconds(self) -> float:
        return self.work + self.bubble + self.passing


def pace(micro: list[float], last: list[float], micro_steps: int, chunks: int, send: float) -> Pace:
    """micro, last: seconds of each stage's ordinary and last micro-step (forward and backward; the last with what
    follows it). send: seconds to pass activations, or their gradients, to the next stage.

    Without interleaving a stage sends and receives between its micro-steps (one forward and one backward each);
    interleaved, only filling and draining waits for transfers.
    """
    count = len(micro)
    best = Pace(0, 0.0, 0.0, 0.0)
    transfers = 2 * (count - 1) + (2 * (micro_steps - 1) if chunks == 1 else 0)
    for i in range(count):
        work = (micro_steps - 1) * micro[i] + last[i]
        bubble = (sum(micro) - micro[i]) / chunks
        if work + bubble > best.work + best.bubble:
            best = Pace(i, work, bubble, transfers * send if count > 1 else 0.0)
    return best
