"""`omnicompile explain`: why the best plan is what it is, and what another choice would cost, or why it cannot be."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from omnicompile.cli.arguments import add_cluster, add_model, add_workload, cluster_of, workload_of
from omnicompile.cli.progress import emit, working
from omnicompile.errors import PlanError
from omnicompile.plan import Plan, Prediction

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
_SECONDS, _GIB = 1e-4, 2.0**30


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


def _prediction(plan: Plan) -> Prediction:
    assert plan.prediction is not None
    return plan.prediction


def _why(result: PlanResult) -> list[str]:
    best = result.plans[0]
    lines = [f"the best plan: {describe(best)}", *(f"  {note}" for note in best.notes)]
    for plan, lost in zip(result.plans[1:], result.lost_because[1:]):
        lines.append(f"{describe(plan, best)}: {lost}")
    return lines


def _why_not(best: Plan, other: Plan | None, reason: str, asked: dict[str, str]) -> list[str]:
    words = ", ".join(f"{key}={value}" for key, value in asked.items())
    lines = [f"the best plan: {describe(best)}"]
    if other is None:
        return [*lines, f"with {words}: impossible: {reason}"]
    ours, theirs = _prediction(best), _prediction(other)
    change = theirs.step_seconds / ours.step_seconds - 1
    differs = describe(other, best)
    if not differs:
        return [*lines, f"with {words}: it is the best plan already"]
    speed = "as fast" if abs(change) < 5e-4 else f"{abs(change):.1%} {'slower' if change > 0 else 'faster'}"
    lines.append(f"with {words}: {speed} ({theirs.step_seconds:.3f} s a step instead of {ours.step_seconds:.3f} s)")
    lines.append(f"  the best plan with it differs in {differs}")
    lines += _table("time", ours.time, theirs.time, _SECONDS, lambda x: f"{x:+.3f} s")
    lines += _table("memory per GPU", ours.memory, theirs.memory, _GIB / 100, lambda x: f"{x / _GIB:+.2f} GiB")
    lines += _table("compute by block", ours.block_time, theirs.block_time, _SECONDS, lambda x: f"{x:+.3f} s")
    return lines


def _changes(ours: dict[str, float], theirs: dict[str, float], least: float) -> dict[str, float]:
    """What the other has more (+) or less (-), largest first, without what hardly differs."""
    found = {kind: theirs.get(kind, 0.0) - ours.get(kind, 0.0) for kind in {*ours, *theirs}}
    return dict(sorted(((k, v) for k, v in found.items() if abs(v) >= least), key=lambda item: -abs(item[1])))


def _table(title: str, ours: dict[str, float], theirs: dict[str, float], least: float, word: Any) -> list[str]:
    changes = _changes(ours, theirs, least)
    return [f"  {title}: {', '.join(f'{kind} {word(value)}' for kind, value in changes.items())}"] if changes else []


def fields_of(plan: Plan) -> dict[str, str]:
    """The plan's choices by the names that pins give them."""
    found = {f"mesh.{name}": str(value) for name, value in vars(plan.mesh).items()}
    found |= {"micro_batch": str(plan.micro_batch), "accumulation": str(plan.accumulation)}
    found |= {"loss_head": str(plan.loss_head), "offload_optimizer": str(plan.offload_optimizer).lower()}
    for block, choices in plan.blocks.items():
        found |= {f"{block}.{name}": str(value) for name, value in vars(choices).items()}
    return found


def describe(plan: Plan, than: Plan | None = None) -> str:
    """The choices that differ from `than`; without it the ones that say most."""
    if than is not None:
        before = fields_of(than)
        return ", ".join(f"{k}={v}" for k, v in fields_of(plan).items() if before.get(k) != v)
    mesh = ", ".join(f"{name}={value}" for name, value in vars(plan.mesh).items() if value > 1)
    blocks = "; ".join(
        f"{name}: {b.sharding}, {b.layout}, recompute {b.recompute}{', frozen' if b.frozen else ''}"
        for name, b in plan.blocks.items()
    )
    step = f"micro-batch {plan.micro_batch}, {_prediction(plan).step_seconds:.3f} s a step"
    return f"{mesh or 'one rank'}; {blocks}; {step}"


def _json(free: PlanResult, other: Plan | None, reason: str) -> dict[str, Any]:
    best = free.plans[0]
    view: dict[str, Any] = {"best": fields_of(best), "step_seconds": _prediction(best).step_seconds}
    view |= {"notes": list(best.notes), "refused": free.refused}
    if other is not None:
        ours, theirs = _prediction(best), _prediction(other)
        view["other"] = {
            "choices": fields_of(other),
            "step_seconds": theirs.step_seconds,
            "time": _changes(ours.time, theirs.time, 0.0),
            "memory": _changes(ours.memory, theirs.memory, 0.0),
        }
    elif reason:
        view["impossible"] = reason
    return view
