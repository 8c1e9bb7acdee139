"""`omnicompile recipes`: the zoo of plans for published models: list them, print one, copy one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnicompile.cli.progress import emit
from omnicompile.errors import InputError

if TYPE_CHECKING:
    from omnicompile.plan import Plan
    from omnicompile.recipes import Recipe

HELP = "plans that ship with the package for published models: list, show or copy them"
EXAMPLES = """\
examples:
  omnicompile recipes
      every recipe with its model, GPUs, sample length, mesh and predicted figures
  omnicompile recipes show NAME
      the recipe file
  omnicompile recipes copy NAME recipe.yaml
      a file of one's own to edit, and to plan, compare or export with
  omnicompile recipes --json
      the list for programs
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(name=None)
    json_help = "print JSON for programs"
    parser.add_argument("--json", action="store_true", help=json_help)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", help="show NAME, or copy NAME PATH")
    show = actions.add_parser("show", help="print a recipe", allow_abbrev=False)
    show.add_argument("name", metavar="NAME", help="a recipe of the zoo")
    show.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=json_help)
    copy = actions.add_parser("copy", help="write a recipe to a file", allow_abbrev=False)
    copy.add_argument("name", metavar="NAME", help="a recipe of the zoo")
    copy.add_argument("path", metavar="PATH", help="the file to write, or the directory to write NAME.yaml to")
    for action in (show, copy):
        action.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    from omnicompile.recipes import find, recipes

    if args.action is None:
        found = recipes()
        emit(json.dumps([_entry(recipe) for recipe in found], indent=2) if args.json else _table(found))
    elif args.action == "show":
        recipe = find(args.name)
        emit(_json(recipe) if args.json else recipe.text().rstrip("\n"))
    else:
        if args.json:
            raise InputError("--json goes with the list and with show, not with copy")
        emit(f"copied to {_copy(find(args.name), args.path)}")
    return 0


def _json(recipe: Recipe) -> str:
    from omnicompile.report.json_view import plan_json

    return json.dumps({"name": recipe.name, **plan_json(recipe.load())}, indent=2)


def _copy(recipe: Recipe, path: str) -> Path:
    from omnicompile.whole_file import check_target, write_whole

    target = Path(path)
    if target.is_dir():
        target = target / f"{recipe.name}.yaml"
    check_target(str(target), "PATH")
    if target.exists():
        raise InputError(f"{target} exists; name another file, or delete it first")
    write_whole(target, recipe.text())
    return target


def _entry(recipe: Recipe) -> dict[str, Any]:
    """What the list says of a recipe, for programs."""
    from omnicompile.schema import encode

    plan = recipe.load()
    prediction = plan.prediction
    assert prediction is not None, "the generator writes predictions"
    return {
        "name": recipe.name,
        "model": plan.model,
        "gpus": plan.cluster.gpus,
        "gpu": plan.cluster.gpu,
        "seq_len": plan.workload.seq_len,
        "global_batch": plan.global_batch,
        "tokens_per_second_per_gpu": prediction.tokens_per_second_per_gpu,
        "mfu": prediction.mfu,
        "memory_bytes": prediction.memory_total,
        "memory_capacity_bytes": prediction.memory_capacity,
        "mesh": encode(plan.mesh),
    }


def _table(found: list[Recipe]) -> str:
    rows: list[tuple[str, ...]] = [("recipe", "model", "GPUs", "length", "t/s/GPU", "MFU", "memory", "mesh")]
    rows += [_row(recipe, recipe.load()) for recipe in found]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    left = (0, 1, len(widths) - 1)
    lines = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    ]
    about = "Predicted by the cost model: tokens/s/GPU; MFU with causal attention as half; GiB per GPU."
    return "\n".join([*(line.rstrip() for line in lines), "", about, "One of them: omnicompile recipes show NAME"])


def _row(recipe: Recipe, plan: Plan) -> tuple[str, ...]:
    from omnicompile.report.units import GIB, percent

    prediction = plan.prediction
    assert prediction is not None, "the generator writes predictions"
    return (
        recipe.name,
        _model_name(plan.model),
        f"{plan.cluster.gpus} {plan.cluster.gpu}",
        f"{plan.workload.seq_len // 1024}K",
        f"{prediction.tokens_per_second_per_gpu:,.0f}",
        percent(prediction.mfu),
        f"{prediction.memory_total / GIB:.1f}",
        _mesh(plan),
    )


def _model_name(spec: str) -> str:
    """net of package.models.net:build, function of package.models:function."""
    module, _, function = spec.rpartition(":")
    return module.rpartition(".")[2] if function == "build" else function


def _mesh(plan: Plan) -> str:
    """The degrees that are not 1: dp_shard 64 x sp 2, ep 2."""
    from omnicompile.schema import encode

    degrees = {name: degree for name, degree in encode(plan.mesh).items() if degree > 1}
    expert = degrees.pop("ep", 1)
    product = " x ".join(f"{name} {degree}" for name, degree in degrees.items()) or "1 rank"
    return product + (f", ep {expert}" if expert > 1 else "")
