"""`omnicompile compare`: two recipes of one model, priced alike: what differs and what it costs where."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from omnicompile.cli.progress import emit, working
from omnicompile.errors import InputError
from omnicompile.plan import Plan
from omnicompile.report.comparison import comparison_json, cost_lines, describe, fields_of, prediction, speed_words

HELP = "compare two recipes of one model: the choices that differ, and what they cost in time and memory"
EXAMPLES = """\
examples:
  omnicompile compare a.yaml b.yaml
      both are priced by the present cost model, for the model that they name
  omnicompile compare a.yaml b.yaml --model model.py
      the model's file has moved
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="A.yaml", help="a recipe")
    parser.add_argument("second", metavar="B.yaml", help="the recipe to compare with it")
    parser.add_argument("--model", metavar="MODEL", help="the model, if not as the recipes name it")
    parser.add_argument("--config", metavar="FILE", help="the config.json of a model named as package.module:Class")
    parser.add_argument("--no-cache", action="store_true", help="trace the model again, even if it was traced before")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def run(args: argparse.Namespace) -> int:
    from omnicompile.recipe import load_recipe

    first, second = (_priced(load_recipe(path), args) for path in (args.first, args.second))
    if args.json:
        view = {"first": {"choices": fields_of(first), "step_seconds": prediction(first).step_seconds}}
        emit(json.dumps(view | {"second": comparison_json(second, first)}, indent=2))
    else:
        emit("\n".join(_lines(first, second, args)))
    return 0


def _priced(plan: Plan, args: argparse.Namespace) -> Plan:
    """The plan with the prediction of the present cost model."""
    from omnicompile.capture.api import capture_program
    from omnicompile.capture.source import load_model_source
    from omnicompile.planner.predict import simulate

    model = args.model or plan.model
    if not model:
        raise InputError("the recipe names no model: give it with --model")
    with working(f"reading {model}", args.debug) as show:
        source = load_model_source(model, args.config)
        program = capture_program(source, plan.workload, source.cacheable and not args.no_cache, show)
        return simulate(program, replace(plan, prediction=None))


def _lines(first: Plan, second: Plan, args: argparse.Namespace) -> list[str]:
    lines = [f"{args.first}: {describe(first)}", f"{args.second}: {_speed(first, second)}"]
    machine = _machine_words(first, second)
    differs = ", ".join(part for part in (machine, describe(second, first)) if part)
    if not differs:
        return [lines[0], f"{args.second}: the same plan"]
    return [*lines, f"  differs in {differs}", *cost_lines(second, first), *_fit(second, args.second)]


def _speed(first: Plan, second: Plan) -> str:
    """By time where both do the same work, otherwise by tokens."""
    if _machine_words(first, second):
        mine, other = (prediction(p).tokens_per_second_per_gpu for p in (first, second))
        return f"{other:,.0f} tokens/s/GPU instead of {mine:,.0f} ({other / mine - 1:+.1%})"
    return speed_words(second, first)


def _machine_words(first: Plan, second: Plan) -> str:
    pairs = [(vars(first.cluster), vars(second.cluster)), (vars(first.workload), vars(second.workload))]
    return ", ".join(f"{k}={b[k]} (not {a[k]})" for a, b in pairs for k in a if a[k] != b[k])


def _fit(plan: Plan, name: str) -> list[str]:
    if prediction(plan).fits:
        return []
    over = (prediction(plan).memory_total - prediction(plan).memory_capacity) / 2**30
    return [f"  {name} does not fit: {over:.1f} GiB too much per GPU"]
