"""`omnicompile show`: the program of one rank at any stage of its lowering, as readable Python."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from omnicompile.cli.progress import emit, working
from omnicompile.cli.verify import add_tiny_plan, chosen_plan, tiny_plan
from omnicompile.errors import InputError

if TYPE_CHECKING:
    from omnicompile.passes.rank_program import RankProgram

HELP = "print one rank's program at any stage of its lowering, with placements and the collectives added"
EXAMPLES = """\
examples:
  omnicompile show model.py --list
  omnicompile show model.py --gpus 8 --tiny --stage sequence-parallel
  omnicompile show model.py --recipe recipe.yaml --stage lowered
      at full size, with the recipe's mesh and workload
  omnicompile show model.py --gpus 8 --tiny --stage parameters --diff expert-parallel
      what the pass changed
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_tiny_plan(parser)
    parser.add_argument("--stage", metavar="NAME", default="lowered", help="which program to print (lowered)")
    parser.add_argument("--diff", metavar="STAGE", help="print what changed since this stage")
    parser.add_argument("--tiny", action="store_true", help="of a tiny copy of the model, as verify runs it")
    parser.add_argument("--full", action="store_true", help="print every layer, not one of each kind")
    parser.add_argument("--list", action="store_true", help="print the names of the stages")
    parser.add_argument("--seq-len", type=int, metavar="N", help="tokens of a sample at full size (8192)")


def run(args: argparse.Namespace) -> int:
    from omnicompile.lowering.stages import find_stages, stage_names

    if args.list:
        emit("\n".join(stage_names()))
        return 0
    wanted = {args.stage} if args.diff is None else {args.stage, args.diff}
    if unknown := wanted - set(stage_names()):
        raise InputError(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(stage_names())}")
    from omnicompile.report.program_text import diff_text, program_text

    with working(f"reading {args.model}", args.debug) as show:
        before = _tiny(args, show) if args.tiny else _full(args, show)
        show("lowering")
        stages = find_stages(before, wanted)
        texts = {name: program_text(stage.program, args.full) for name, stage in stages.items()}
    if args.diff is None:
        emit(texts[args.stage])
    else:
        emit(diff_text(texts[args.diff], texts[args.stage], (args.diff, args.stage)) or "nothing changed")
    return 0


def _tiny(args: argparse.Namespace, show: Any) -> RankProgram:
    from omnicompile.lowering.proof import capture_tiny

    _, tiny, plan = tiny_plan(args, show)
    return capture_tiny(tiny, plan).before


def _full(args: argparse.Namespace, show: Any) -> RankProgram:
    from dataclasses import replace

    from omnicompile.capture.source import load_model_source
    from omnicompile.lowering.full_size import full_batch, full_program
    from omnicompile.recipe import load_recipe
    from omnicompile.support import refuse_unexecutable
    from omnicompile.workload import Workload

    recipe = load_recipe(args.recipe) if args.recipe is not None else None
    if recipe is not None:
        refuse_unexecutable(recipe)
    source = load_model_source(args.model, args.config)
    show("building the model without weights")
    model = source.build_meta()
    workload = recipe.workload if recipe is not None else source.workload or Workload()
    if args.seq_len is not None:
        workload = replace(workload, seq_len=args.seq_len)
    show("making a batch")
    batch = full_batch(source, model, workload, recipe.micro_batch if recipe is not None else 1)
    plan = recipe or chosen_plan(args, model, batch)
    show("tracing the forward")
    return full_program(model.train(), batch, plan).before
