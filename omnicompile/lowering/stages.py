"""A program at every stage of its lowering."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from omnicompile.errors import InputError
from omnicompile.lowering.step_graph import trace_step
from omnicompile.passes import FORWARD_PASSES
from omnicompile.passes.manager import run_passes
from omnicompile.passes.rank_program import RankProgram

CAPTURED, LOWERED, STEP = "captured", "lowered", "step"


@dataclass(frozen=True)
class Stage:
    name: str
    program: RankProgram


def stage_names() -> tuple[str, ...]:
    """In order. "lowered" is the last pass's result; "step" is forward, loss and backward in one graph."""
    return (CAPTURED, *(item.name for item in FORWARD_PASSES), LOWERED, STEP)


def program_stages(before: RankProgram) -> Iterator[Stage]:
    """Every stage, each made when it is asked for; earlier ones stay as they were."""
    program = before.copy()
    yield Stage(CAPTURED, program)
    for item in FORWARD_PASSES:
        program = run_passes(program.copy(), [item])
        yield Stage(item.name, program)
    yield Stage(LOWERED, program)
    yield Stage(STEP, replace(program, gm=trace_step(program).gm, outputs=()))


def find_stages(before: RankProgram, wanted: set[str]) -> dict[str, Stage]:
    """The stages named in `wanted`. Raises InputError for a name that no stage has."""
    unknown = wanted - set(stage_names())
    if unknown:
        raise InputError(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(stage_names())}")
    found: dict[str, Stage] = {}
    for stage in program_stages(before):
        if stage.name in wanted:
            found[stage.name] = stage
        if len(found) == len(wanted):
            break
    return found
