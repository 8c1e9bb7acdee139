"""`omnicompile verify`: proves that the rewritten model equals the original, on a tiny copy of it, in one process."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from omnicompile.cli.arguments import MODEL_HELP
from omnicompile.cli.progress import emit, working
from omnicompile.errors import InputError, VerificationError

if TYPE_CHECKING:
    from torch import nn

    from omnicompile.capture.source import ModelSource
    from omnicompile.lowering.proof import ProofReport
    from omnicompile.lowering.tiny import TinyModel
    from omnicompile.plan import Plan

HELP = "prove on a tiny copy of a model that its distributed form gives the same loss and gradients"
EXAMPLES = """\
examples:
  omnicompile verify model.py --gpus 8
      HSDP, sequence and expert parallelism at once, on 8 simulated ranks
  omnicompile verify model.py --gpus 8 --recipe recipe.yaml
      the recipe's choices, its mesh reduced to 8 ranks
  omnicompile verify model.py --gpus 4 --pin mesh.sp=4 --pin vision.layout=replicated
  omnicompile verify model.py --gpus 4 --dtype float64

The exit code is 0 when they are equal, 1 when they are not, 2 when the model or the plan cannot be lowered.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_tiny_plan(parser)
    parser.add_argument("--top", type=int, default=5, metavar="K", help="how many of the worst errors to show (5)")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def add_tiny_plan(parser: argparse.ArgumentParser) -> None:
    """The model, and which plan its tiny copy is lowered with."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--config", metavar="FILE", help="the config.json of a model named as package.module:Class")
    parser.add_argument("--gpus", type=int, metavar="N", help="ranks (8, or as many as the recipe has if fewer)")
    parser.add_argument("--recipe", metavar="FILE", help="a whole recipe, as `plan --out` saves it")
    parser.add_argument(
        "--pin", action="append", default=[], metavar="KEY=VALUE", help="a choice, such as mesh.sp=4 (repeatable)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "float64"), help="of the computation (float64 where the operators allow)"
    )


def run(args: argparse.Namespace) -> int:
    if args.top < 1:
        raise InputError(f"--top must be at least 1, got {args.top}")
    with working(f"reading {args.model}", args.debug) as show:
        source, tiny, plan = tiny_plan(args, show)
        from omnicompile.lowering.proof import prove

        show(f"running {plan.mesh.world} ranks")
        try:
            report = prove(tiny, plan, source.spec)
        except VerificationError as error:
            failure, report = " ".join(str(error).split()), None
    if report is None:
        failed = {"model": source.spec, "equal": False, "failure": failure}
        emit(json.dumps(failed) if args.json else f"NOT EQUAL: {failure}")
        return 1
    emit(json.dumps(_json(report, args.top), indent=2) if args.json else _text(report, args.top))
    return 0 if report.equal else 1


def tiny_plan(args: argparse.Namespace, show: Any) -> tuple[ModelSource, TinyModel, Plan]:
    """The source, its tiny copy, and the plan to lower it with."""
    import torch

    from omnicompile.capture.source import load_model_source
    from omnicompile.lowering.proof_plan import count_experts, reduced_plan
    from omnicompile.lowering.tiny import tiny_copy
    from omnicompile.recipe import load_recipe
    from omnicompile.support import refuse_unexecutable

    recipe = load_recipe(args.recipe) if args.recipe is not None else None
    if recipe is not None:
        refuse_unexecutable(recipe)
    source = load_model_source(args.model, args.config)
    show("making a tiny copy")
    tiny = tiny_copy(source, {"float64": torch.float64, "float32": torch.float32}.get(args.dtype))
    if recipe is not None:
        gpus = args.gpus if args.gpus is not None else min(8, recipe.mesh.world)
        recipe = reduced_plan(recipe, gpus, count_experts(tiny.model))
    return source, tiny, chosen_plan(args, tiny.model, tiny.batch(0), recipe)


def chosen_plan(args: argparse.Namespace, model: nn.Module, batch: dict[str, Any], base: Plan | None = None) -> Plan:
    """`base`, or the default plan of `--gpus` ranks, with the choices of `--pin`."""
    if args.gpus is not None and args.gpus < 1:
        raise InputError(f"--gpus must be at least 1, got {args.gpus}")
    from omnicompile.lowering import proof_plan
    from omnicompile.planner.pins import parse_pins as typed
    from omnicompile.recipe import parse_pins
    from omnicompile.support import refuse_unexecutable

    plan = base or proof_plan.default_plan(model, batch, args.gpus or 8)
    chosen = typed(parse_pins(args.pin), _blocks_only(plan))
    if not chosen:
        return plan
    wanted = replace(plan, mesh=replace(plan.mesh, **chosen.mesh), stack=replace(plan.stack, **chosen.stack))
    refuse_unexecutable(wanted)
    experts = proof_plan.count_experts(model)
    plan = proof_plan.with_choices(plan, chosen.mesh, chosen.blocks, experts, chosen.overlap)
    refuse_unexecutable(plan)
    return plan


def _blocks_only(plan: Plan) -> Any:
    """A Program that says no more than which blocks there are."""
    from omnicompile.program import Block, Program, SampleShape

    blocks = tuple(Block(name, "", "", ()) for name in plan.blocks)
    return Program(plan.model, plan.model, blocks, (), (), (), SampleShape())


def mesh_text(plan: Plan) -> str:
    m = plan.mesh
    folded = f", ep {m.ep}" if m.ep > 1 else ""
    return f"{m.world} ranks = dp_replicate {m.dp_replicate} x dp_shard {m.dp_shard} x sp {m.sp}{folded}"


def _text(report: ProofReport, top: int) -> str:
    from omnicompile.report.figures import forward_words

    lines = [
        f"{'equal' if report.equal else 'NOT EQUAL'}: {report.model} on {report.plan.mesh.world} ranks "
        f"(tolerance {report.tolerance:.0e})",
        f"  tiny copy    {'; '.join(report.notes)}",
        f"  mesh         {mesh_text(report.plan)}",
    ]
    for name, block in report.plan.blocks.items():
        ep = f", ep {block.ep}" if block.ep > 1 else ""
        lines.append(f"  {name:<12} {block.sharding}, {block.layout}{f', sp {block.sp}' if block.sp > 1 else ''}{ep}")
    if words := forward_words(report.plan.overlap):
        lines.append(f"  overlap      {', '.join(words)}")
    for (what, axes), count in sorted(report.collectives.items()):
        lines.append(f"  inserted     {count:>4} x {what} over {axes}")
    checked = f"{report.nodes} values hold their placement on every rank" if not report.verdict else report.verdict
    lines.append(f"  placements   {checked}")
    lines.append(f"  loss         {report.loss:.8g}, off by {report.loss_error:.1e}")
    lines.append(f"  gradients    {len(report.errors)} compared, the worst:")
    lines += [f"    {error:.1e}  {name}" for name, error in report.worst_first(top)]
    return "\n".join(lines)


def _json(report: ProofReport, top: int) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "model": report.model,
        "equal": report.equal,
        "tolerance": report.tolerance,
        "mesh": asdict(report.plan.mesh),
        "blocks": {name: asdict(block) for name, block in report.plan.blocks.items()},
        "overlap": asdict(report.plan.overlap),
        "collectives": [{"what": w, "axes": a, "count": n} for (w, a), n in sorted(report.collectives.items())],
        "values_checked": report.nodes,
        "verdict": report.verdict,
        "loss": report.loss,
        "loss_error": report.loss_error,
        "gradients": len(report.errors),
        "worst": [{"parameter": name, "error": error} for name, error in report.worst_first(top)],
        "notes": list(report.notes),
    }
