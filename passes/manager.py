"""Runs passes in order and checks their contracts up front."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from omnicompile.passes.rank_program import RankProgram
from omnicompile.plan import Plan

logger = logging.getLogger(__name__)
PassFunction = Callable[[RankProgram, Plan | None], RankProgram]


@dataclass(frozen=True)
class Pass:
    """requires: what must have been provided before (by a pass or by the input). excludes: what must not have been."""

    name: str
    run: PassFunction
    requires: frozenset[str] = frozenset()
    provides: frozenset[str] = frozenset()
    excludes: frozenset[str] = frozenset()


def check_contracts(passes: Sequence[Pass], given: frozenset[str] = frozenset()) -> None:
    """Raises ValueError if a pass would run before what it requires, or after what it excludes."""
    have = set(given)
    for item in passes:
        missing, conflict = item.requires - have, item.excludes & have
        if missing:
            raise ValueError(f"pass {item.name} requires {', '.join(sorted(missing))}, which no earlier pass provides")
        if conflict:
            raise ValueError(f"pass {item.name} must run before {', '.join(sorted(conflict))}")
        have |= item.provides


def run_passes(program: RankProgram, passes: Sequence[Pass], plan: Plan | None = None) -> RankProgram:
    """Run them all; `program.done` names them, `program.log` has a line of each."""
    check_contracts(passes, frozenset(program.done))
    for item in passes:
        lines = len(program.log)
        program = item.run(program, plan)
        program.done = (*program.done, *sorted(item.provides))
        for line in program.log[lines:]:
            logger.info("%s: %s", item.name, line)
    return program
