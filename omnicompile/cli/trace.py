"""The option `--trace` of several commands: the timeline of a plan's step, for ui.perfetto.dev."""

from __future__ import annotations

import argparse

from omnicompile.plan import Plan
from omnicompile.program import Program
from omnicompile.whole_file import check_target


def add_trace(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--trace", metavar="FILE", help="write the timeline of a step for Perfetto (JSON)")


def check_trace(args: argparse.Namespace) -> None:
    """Before anything is computed: raises InputError if the timeline could not be written."""
    if args.trace is not None:
        check_target(args.trace, "--trace")


def write_trace(args: argparse.Namespace, plan: Plan, program: Program) -> str:
    """Write the last micro-step of `plan`; returns what to tell the user. Raises InputError if it cannot be written."""
    from omnicompile.cost_model.step_model import StepModel
    from omnicompile.planner.predict import last_micro_step
    from omnicompile.report.trace import save_trace

    title = f"{plan.model} on {plan.cluster.gpus} x {plan.cluster.gpu}"
    save_trace(last_micro_step(plan, StepModel(program, plan.cluster)), title, args.trace)
    return f"timeline of the step's last micro-step saved as {args.trace}: open it in ui.perfetto.dev"
