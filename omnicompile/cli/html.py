"""The option `--html` of several commands: the page of a plan, in one file."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date

from omnicompile.cli.progress import Progress
from omnicompile.errors import InputError
from omnicompile.plan import Plan
from omnicompile.program import Program
from omnicompile.whole_file import check_target, write_whole


def add_html(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--html",
        metavar="FILE",
        help="write the plan as a page: blocks, memory, timeline, other sample lengths and GPU counts",
    )


def check_html(args: argparse.Namespace) -> None:
    """Before anything is computed: raises InputError if the page could not be written."""
    if args.html is not None:
        check_target(args.html, "--html")


@dataclass(frozen=True)
class Shown:
    """What the page is of. plans: its own, then the next best; reasons: why each lost. pins: what a search kept (None:
    there was no search). explored: plans that the search was among. searched: that in words."""

    plans: Sequence[Plan]
    reasons: Sequence[str]
    program: Program
    pins: Mapping[str, str] | None = None
    explored: int = 0
    searched: str = ""


def write_html(args: argparse.Namespace, shown: Shown, progress: Progress) -> None:
    """Plan at other sizes, and write the page. Raises InputError if it cannot be written."""
    from omnicompile.cli.main import version
    from omnicompile.planner.picture import picture_of
    from omnicompile.planner.sweep import affordable_points, sweep
    from omnicompile.report.html.page import Page, page_html

    plan, program = shown.plans[0], shown.program
    page = Page(
        plans=shown.plans,
        reasons=shown.reasons,
        program=program,
        picture=picture_of(plan, program),
        curves=sweep(plan, program, shown.pins, progress, affordable_points(shown.explored)),
        command=shlex.join(["omnicompile", *args.command_line]),
        made=f"Made on {date.today().isoformat()} with OmniCompile {version()}",
        searched=shown.searched,
    )
    try:
        write_whole(args.html, page_html(page))
    except OSError as error:
        raise InputError(f"--html {args.html}: cannot be written: {error.strerror}") from error
