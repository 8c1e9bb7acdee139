"""`omnicompile simulate`: what one given layout would take, without a search."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from omnicompile.cli.arguments import add_cluster, add_model, add_workload, cluster_of, workload_of
from omnicompile.cli.html import Shown, add_html, check_html, write_html
from omnicompile.cli.progress import color_wanted, emit, working
from omnicompile.cli.trace import add_trace, check_trace, write_trace

if TYPE_CHECKING:
    from omnicompile.plan import Plan
    from omnicompile.program import Program

HELP = "price one given layout: step time, tokens/s, MFU, memory, exposed communication"
EXAMPLES = """\
examples:
  omnicompile simulate model.py --gpus 128 --layout "sp=4, recompute=full"
      everything that is not stated has its plainest value: fsdp over all ranks, micro-batch 1, a whole loss head
  omnicompile simulate model.py --gpus 64 --layout "sp=8,ep=8,vision.layout=replicated,loss_head=chunked" --json
  omnicompile simulate model.py --gpus 64 --layout "tp=4, pp=4, pipeline_chunks=4, sharding=zero1, gemm_dtype=float8"
      what other systems run and OmniCompile does not yet is priced all the same
  omnicompile simulate model.py --recipe recipe.yaml
      the plan of a recipe, priced again
  omnicompile simulate model.py --gpus 8 --layout "dp_replicate=2,sharding=hsdp" --trace step.json
      the timeline of a step, for ui.perfetto.dev
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_cluster(parser)
    add_workload(parser)
    group = parser.add_argument_group("layout")
    group.add_argument(
        "--layout",
        metavar="CHOICES",
        default="",
        help="mesh (dp_replicate, dp_shard, sp, ep, tp, pp, cp), step (micro_batch, accumulation, loss_head, ...), "
        "blocks (text.recompute=full, or recompute=full for all blocks) and what another software stack does "
        "differently (gemm_dtype, pipeline_chunks, tp_sequence, ...; docs/cost_model.md), separated by commas",
    )
    group.add_argument("--recipe", metavar="FILE", help="the choices of a recipe; --layout goes before them")
    output = parser.add_argument_group("output")
    add_trace(output)
    add_html(output)
    output.add_argument("--json", action="store_true", help="print JSON for programs")


def run(args: argparse.Namespace) -> int:
    from omnicompile.recipe import load_machine, load_pins, split_choices

    check_html(args)
    check_trace(args)
    machine: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    layout: dict[str, str] = {}
    if args.recipe is not None:
        machine, layout = load_machine(args.recipe), load_pins(args.recipe)
    layout |= split_choices(args.layout, "--layout")
    plan, program = _priced(args, machine, layout)
    if args.html is not None:
        with working("drawing the page", args.debug) as show:
            write_html(args, Shown([plan], [""], program), show)
    traced = write_trace(args, plan, program) if args.trace is not None else ""
    if args.json:
        from omnicompile.report.json_view import plans_json

        emit(json.dumps(plans_json([plan], [""], program), indent=2))
        return 0
    from omnicompile.report.terminal import plan_text

    emit(plan_text(plan, program, color=color_wanted()))
    if args.html is not None:
        emit(f"\npage saved as {args.html}")
    if traced:
        emit(f"\n{traced}")
    return 0


def _priced(
    args: argparse.Namespace, machine: tuple[dict[str, Any], dict[str, Any]], layout: dict[str, str]
) -> tuple[Plan, Program]:
    from omnicompile.capture.api import capture_program
    from omnicompile.capture.source import load_model_source
    from omnicompile.cost_model.hardware import load_hardware
    from omnicompile.planner.given import given_plan
    from omnicompile.planner.predict import simulate

    cluster = cluster_of(args, machine[0])
    load_hardware(cluster.gpu)
    with working(f"reading {args.model}", args.debug) as show:
        source = load_model_source(args.model, args.config)
        workload = workload_of(args, source.workload, machine[1])
        program = capture_program(source, workload, source.cacheable and not args.no_cache, show)
        plan = simulate(program, given_plan(program, cluster, workload, layout, source.spec))
    return plan, program
