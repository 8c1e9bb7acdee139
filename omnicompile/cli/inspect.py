"""`omnicompile inspect`: the traced model, with what each part of it costs."""

from __future__ import annotations

import argparse
import json

from omnicompile.cli.arguments import add_model, add_workload, workload_of
from omnicompile.cli.progress import color_wanted, emit, working

HELP = "print a model's modality blocks and layer kinds with parameters, FLOPs and activation bytes"
EXAMPLES = """\
examples:
  omnicompile inspect examples/custom_model.py
  omnicompile inspect config.json --seq-len 32768 --images 4
  omnicompile inspect model.py --formulas
      FLOPs, bytes and memory of each block as formulas in the tokens, patches, sp, ep, dp_shard
  omnicompile inspect model.py --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_workload(parser)
    parser.add_argument("--formulas", action="store_true", help="print FLOPs, bytes and memory as formulas")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def run(args: argparse.Namespace) -> int:
    from omnicompile.capture.source import load_model_source

    with working(f"reading {args.model}", args.debug) as show:
        source = load_model_source(args.model, args.config)
        workload = workload_of(args, source.workload, {})
        from omnicompile.capture.api import capture_program

        program = capture_program(source, workload, cache=source.cacheable and not args.no_cache, progress=show)
    values = program.symbol_values()
    if args.formulas:
        from omnicompile.report.formulas import formulas_json, formulas_text

        emit(json.dumps(formulas_json(program), indent=2) if args.json else formulas_text(program))
    elif args.json:
        from omnicompile.report.json_view import program_json

        emit(json.dumps(program_json(program, values), indent=2))
    else:
        from omnicompile.report.program_view import program_text

        emit(program_text(program, values, color=color_wanted()))
    return 0
