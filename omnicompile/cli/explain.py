"""`omnicompile explain`: why the best plan is what it is, and what another choice would cost, or why it cannot be."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from omnicompile.cli.arguments import add_cluster, add_model, add_workload, cluster_of, workload_of
from omnicompile.cli.progress import emit, working
from omnicompile.errors import PlanError
from omnicompile.plan import Plan
from omnicompile.report.comparison import comparison_json, cost_lines, describe, fields_of, prediction, speed_words

if TYPE_CHECKING:
    from omnicompile.planner.api import PlanResult

HELP = "say why the best plan won, and what another choice would cost or why it cannot be taken"
EXAMPLES = """\
examples:
  omnicompile explain model.py --gpus 128
      what limits the best plan, and by how much the next best are slower
  omnicompile explain model.py --gpus 128 --why-not sp=8
  omnicompile explain model.py --gpus 128 --why-not "vision.layout=sequence, text.recompute=full"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_cluster(parser)
    add_workload(parser)
    parser.add_argument("--recipe", metavar="FILE", help="keep the choices of a recipe, or of any part of one")
    parser.add_argument("--pin", action="append", default=[], metavar="KEY=VALUE", help="keep a choice (repeatable)")
    parser.add_argument(
        "--why-not", metavar="CHOICES", help="choices to compare with: sp=8, vision.layout=sequence, ..."
    )
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def run(args: argparse.Namespace) -> int:
    from omnicompile.capture.source import load_model_source
    from omnicompile.planner.api import plan_program, plan_source
    from omnicompile.recipe import load_machine, load_pins, parse_pins

    machine: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    pins: dict[str, str] = {}
    if args.recipe is not None:
        machine, pins = load_machine(args.recipe), load_pins(args.recipe)
    cluster = cluster_of(args, machine[0])
    pins |= parse_pins(args.pin)
    asked = parse_pins(args.why_not.split(",")) if args.why_not is not None else {}
    with working(f"reading {args.model}", args.debug) as show:
        source = load_model_source(args.model, args.config)
        workload = workload_of(args, source.workload, machine[1])
        cache = source.cacheable and not args.no_cache
        free = plan_source(source, cluster, workload, pins, 1 if asked else 4, cache, show)
        other, reason = None, ""
        if asked:
            try:
                other = plan_program(free.program, cluster, workload, pins | asked, 1, show, source.spec).plans[0]
            except PlanError as error:
                reason = str(error)
    if args.json:
        emit(json.dumps(_json(free, other, reason), indent=2))
    else:
        emit("\n".join(_why_not(free.plans[0], other, reason, asked) if asked else _why(free)))
    return 0


def _why(result: PlanResult) -> list[str]:
    from omnicompile.planner.overlaps import gain_lines

    best = result.plans[0]
    lines = [f"the best plan: {describe(best)}", *(f"  {note}" for note in best.notes)]
    for plan, lost in zip(result.plans[1:], result.lost_because[1:]):
        lines.append(f"{describe(plan, best)}: {lost}")
    lines.append("communication beside compute, each way on only where the simulation gains:")
    return [*lines, *gain_lines(result.gains)]


def _why_not(best: Plan, other: Plan | None, reason: str, asked: dict[str, str]) -> list[str]:
    words = ", ".join(f"{key}={value}" for key, value in asked.items())
    lines = [f"the best plan: {describe(best)}"]
    if other is None:
        return [*lines, f"with {words}: impossible: {reason}"]
    differs = describe(other, best)
    if not differs:
        return [*lines, f"with {words}: it is the best plan already"]
    lines.append(f"with {words}: {speed_words(other, best)}")
    lines.append(f"  the best plan with it differs in {differs}")
    return lines + cost_lines(other, best)


def _json(free: PlanResult, other: Plan | None, reason: str) -> dict[str, Any]:
    best = free.plans[0]
    view: dict[str, Any] = {"best": fields_of(best), "step_seconds": prediction(best).step_seconds}
    view |= {"notes": list(best.notes), "refused": free.refused, "overlap": [asdict(gain) for gain in free.gains]}
    if other is not None:
        view["other"] = comparison_json(other, best)
    elif reason:
        view["impossible"] = reason
    return view
