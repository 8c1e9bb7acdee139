"""`omnicompile export`: a recipe as the configuration of another framework, and what that cannot say."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from omnicompile.cli.progress import emit
from omnicompile.errors import InputError, PlanError

if TYPE_CHECKING:
    from omnicompile.plan import Plan
    from omnicompile.train.options import TrainOptions

HELP = "write a recipe as the configuration of VeOmni, torchtitan, accelerate or Megatron-LM"
EXAMPLES = """\
examples:
  omnicompile export recipe.yaml --to veomni --out train.yaml
      the configuration, and a line for each choice of the plan that is not in it exactly
  omnicompile export NAME --to megatron
      a recipe of the zoo (omnicompile recipes); the configuration goes to stdout, the report to stderr
  omnicompile export recipe.yaml --to accelerate --strict
      exit code 2, and nothing written, if anything is lost
  omnicompile export recipe.yaml --to torchtitan --json
      the configuration and what became of every choice, for programs
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe file, or the name of a recipe of the zoo")
    parser.add_argument("--to", required=True, metavar="TARGET", help="veomni, torchtitan, accelerate or megatron")
    parser.add_argument("--out", metavar="FILE", help="write the configuration to FILE")
    parser.add_argument("--strict", action="store_true", help="fail if any choice of the plan is lost or approximated")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def run(args: argparse.Namespace) -> int:
    from omnicompile.export import export_plan
    from omnicompile.export.report import lost_lines, report_text
    from omnicompile.whole_file import check_target, write_whole

    if args.out is not None:
        check_target(args.out, "--out")
    plan, options = _plan(args.recipe)
    export = export_plan(plan, args.to, options)
    if args.strict and export.lost:
        raise PlanError(f"--strict: {args.to} does not hold the plan: {'; '.join(lost_lines(export.lost))}")
    if args.out is not None:
        write_whole(args.out, export.text)
    if args.json:
        emit(json.dumps(export.to_json(), indent=2))
    elif args.out is not None:
        emit(f"{report_text(export)}\nsaved as {args.out}")
    else:
        emit(export.text.rstrip("\n"))
        print(report_text(export), file=sys.stderr)
    return 0


def _plan(recipe: str) -> tuple[Plan, TrainOptions | None]:
    """The plan of a file, or of a recipe of the zoo; and the training options that the file has, if any."""
    from omnicompile.recipe import load_recipe, read_yaml
    from omnicompile.recipes import find
    from omnicompile.train.settings import SECTION, load_options

    if Path(recipe).exists() or recipe.endswith((".yaml", ".yml")) or "/" in recipe:
        plan = load_recipe(recipe)
        has_options = SECTION in read_yaml(recipe, "recipe")[0]
        return plan, load_options(recipe) if has_options else None
    try:
        return find(recipe).load(), None
    except InputError as error:
        raise InputError(f"there is no file {recipe}, and {error}") from error
