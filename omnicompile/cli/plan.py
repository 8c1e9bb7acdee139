"""`omnicompile plan`: the fastest way to train a model on a cluster that fits its memory."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnicompile.cli.arguments import add_cluster, add_model, add_workload, cluster_of, workload_of
from omnicompile.cli.html import Shown, add_html, check_html, write_html
from omnicompile.cli.progress import color_wanted, emit, working
from omnicompile.cli.trace import add_trace, check_trace, write_trace
from omnicompile.cluster import Cluster
from omnicompile.errors import InputError
from omnicompile.workload import Workload

if TYPE_CHECKING:
    from omnicompile.capture.source import ModelSource
    from omnicompile.plan import Plan
    from omnicompile.planner.api import PlanResult

HELP = "find the fastest plan that fits: mesh, sharding and layout per modality block, recompute, micro-batch"
EXAMPLES = """\
examples:
  omnicompile plan model.py --gpus 128
      the fastest plan for 128 H100s, and the next best with why each lost
  omnicompile plan config.json --gpus 64 --gpu h200 --seq-len 65536 --images 8 --image-size 448x448
      a Hugging Face model by its configuration, another GPU, a longer sample
  omnicompile plan model.py --gpus 128 --freeze encoders --pin vision.sp=1 --pin mesh.sp=4
      keep some choices and let the planner fill in the rest
  omnicompile plan model.py --gpus 128 --out recipe.yaml
      save the plan; edit it, and give it (or any part of it) back with --recipe recipe.yaml
  omnicompile plan model.py --gpus 128 --html report.html
      a page to read and to show: blocks, memory, timeline, other sample lengths and GPU counts
  omnicompile plan model.py --gpus 128 --trace step.json
      the timeline of a step, for ui.perfetto.dev
  omnicompile plan package.module:Class --config config.json --gpus 32 --price 2.5
      a class of a package; with the price of a GPU-hour, the cost of a billion tokens
  omnicompile plan model.py --gpu h100 --min-gpus
      the fewest GPUs that fit
  omnicompile plan model.py --gpus 128 --max-seq-len
      the longest sample that fits
"""


@dataclass(frozen=True)
class Request:
    """What is to be planned, put together from the command line, the recipe and the model's file."""

    source: ModelSource
    cluster: Cluster
    workload: Workload
    pins: dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_cluster(parser)
    add_workload(parser)
    search = parser.add_argument_group("search")
    search.add_argument(
        "--pin",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="keep a choice: vision.sp=1, text.recompute=full, mesh.dp_replicate=2, micro_batch=1 (repeatable)",
    )
    search.add_argument("--recipe", metavar="FILE", help="keep the choices of a recipe, or of any part of one")
    search.add_argument(
        "--priced",
        action="store_true",
        help="also consider what is planned on request only: host offload, images dealt out to SP ranks",
    )
    search.add_argument("--top", type=int, default=4, metavar="K", help="how many plans to show (4)")
    answer = search.add_mutually_exclusive_group()
    answer.add_argument("--min-gpus", action="store_true", help="plan for the fewest GPUs that fit, at most --gpus")
    answer.add_argument("--max-seq-len", action="store_true", help="plan for the longest sequence that fits")
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="FILE", help="save the best plan as a recipe (YAML)")
    add_html(output)
    add_trace(output)
    output.add_argument("--json", action="store_true", help="print JSON for programs")
    output.add_argument(
        "--dry-run",
        action="store_true",
        help="also trace one rank's real graph at full size: memory, collectives, time",
    )


def run(args: argparse.Namespace) -> int:
    if args.top < 1:
        raise InputError(f"--top must be at least 1, got {args.top}")
    if args.dry_run and args.json:
        raise InputError("--dry-run goes with the report, not with --json")
    if args.out is not None and not Path(args.out).resolve().parent.is_dir():
        raise InputError(f"--out {args.out}: directory {Path(args.out).parent} does not exist")
    check_html(args)
    check_trace(args)
    request, result = _search(args)
    best = result.plans[0]
    if args.out is not None:
        best.save(args.out)
    if args.json:
        from omnicompile.report.json_view import plans_json

        view = plans_json(result.plans, result.lost_because, result.program)
        emit(json.dumps(view | {"explored": result.explored, "seconds": result.seconds}, indent=2))
    else:
        emit(_report(result, args.out))
    if args.html is not None:
        shown = Shown(
            result.plans, result.lost_because, result.program, request.pins, result.explored, _searched(result)
        )
        with working("drawing the page", args.debug) as show:
            write_html(args, shown, show)
    if args.html is not None and not args.json:
        emit(f"page saved as {args.html}")
    traced = write_trace(args, best, result.program) if args.trace is not None else ""
    if traced and not args.json:
        emit(traced)
    if args.dry_run:
        emit(_dry_run(args, best))
    return 0


def _dry_run(args: argparse.Namespace, plan: Plan) -> str:
    """One rank and one micro-step of `plan`, traced and priced without the planner."""
    from omnicompile.capture.source import load_model_source
    from omnicompile.lowering.dry_run import dry_run
    from omnicompile.lowering.full_size import full_batch
    from omnicompile.report.dry_run_text import dry_run_text

    with working(f"tracing one rank of {args.model}", args.debug):
        source = load_model_source(args.model, args.config)
        model = source.build_meta().train()
        batch = full_batch(source, model, plan.workload, plan.micro_batch)
        found = dry_run(model, batch, plan)
    return dry_run_text(found, plan)


def _request(args: argparse.Namespace) -> Request:
    from omnicompile.capture.source import load_model_source
    from omnicompile.cost_model.hardware import load_hardware
    from omnicompile.recipe import load_machine, load_pins, parse_pins

    machine: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    pins: dict[str, str] = {}
    if args.recipe is not None:
        machine, pins = load_machine(args.recipe), load_pins(args.recipe)
    cluster = cluster_of(args, machine[0], gpus=_largest(args) if args.min_gpus else None)
    load_hardware(cluster.gpu)  # an unknown GPU is told before the model is traced
    pins |= parse_pins(args.pin)
    if args.priced:
        pins["priced"] = "true"
    source = load_model_source(args.model, args.config)
    workload = workload_of(args, source.workload, machine[1])
    return Request(source, cluster, workload, pins)


def _largest(args: argparse.Namespace) -> int:
    """Where the search for the fewest GPUs ends when --gpus is not given."""
    return 2048 * (args.gpus_per_node or 8)


def _search(args: argparse.Namespace) -> tuple[Request, PlanResult]:
    with working(f"reading {args.model}", args.debug) as show:
        request = _request(args)
        from omnicompile.planner import api

        answer = api.min_gpus if args.min_gpus else api.max_seq_len if args.max_seq_len else api.plan_source
        cache = request.source.cacheable and not args.no_cache
        found = answer(request.source, request.cluster, request.workload, request.pins, args.top, cache, show)
    return request, found


def _report(result: PlanResult, saved: str | None) -> str:
    from omnicompile.report.terminal import plan_text

    text = plan_text(result.plans[0], result.program, result.plans[1:], result.lost_because[1:], color=color_wanted())
    lines = [text, "", _searched(result)]
    if saved is not None:
        lines.append(f"saved as {saved}")
    return "\n".join(lines)


def _searched(result: PlanResult) -> str:
    from omnicompile.report.units import plural, seconds_text

    steps = ", ".join(f"{name} {seconds_text(value)}" for name, value in result.seconds.items())
    return f"{plural(result.explored, 'plan')} considered, {result.simulated:,} of them simulated ({steps})"
