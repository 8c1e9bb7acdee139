"""`omnicompile train`: trains the model of a recipe on data, on the processes that the recipe is for."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from omnicompile.errors import InputError, PlanError

if TYPE_CHECKING:
    from omnicompile.plan import Plan
    from omnicompile.train.run import Request

HELP = "train the model of a recipe on data: packed batches, checkpoints, evaluation, on one node or many"
EXAMPLES = """\
examples:
  omnicompile plan model.py --gpus 8 --out recipe.yaml
  omnicompile train recipe.yaml --data train.jsonl --weights pretrained --out run --steps 1000
      plan for 8 GPUs, then train on them: one process for each, started as torchrun does
  omnicompile train recipe.yaml --data train.jsonl --out run --dry-run
      check everything and train nothing: recipe, model, data, first packs and their fill, memory
  omnicompile train recipe.yaml --data train.jsonl --out run
      go on from the last checkpoint in run/checkpoints, if there is one (--resume never refuses a folder that has one)
  omnicompile train recipe.yaml --data data.yaml --train train.yaml --set optimizer.lr=3e-4 --tensorboard
      where samples come from and how they are packed in data.yaml, training options in train.yaml
  omnicompile train recipe.yaml --data train.jsonl --out run --nnodes 2 --rdzv-endpoint node-0:29500
      the same line on both nodes; examples/slurm_train.sh does it under SLURM

training options, in a `train:` section of the recipe or of --train FILE, or by --set:
  train:
    steps: 1000                    # or epochs: 1
    optimizer: {name: adamw, lr: 1e-4, betas: [0.9, 0.95], weight_decay: 0.1}       # or name: muon
    schedule: {kind: cosine, warmup: 100, final: 0.1}                # constant, linear, cosine, wsd
    clip: 1.0
    freeze: [model.visual]         # modules or parameters that are not trained
    accumulation: 4                # micro-steps of a step, in place of the plan's
    evaluation: {data: eval.jsonl, every: 200}
    checkpoint_every: 200
    keep_last: 3
    skip_nonfinite: 0              # steps with a loss that is not finite that may be left out

SIGTERM and Ctrl-C end training after the present step, with a checkpoint. docs/training.md says more.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a whole recipe, as `omnicompile plan --out` saves it")
    parser.add_argument(
        "--data", required=True, metavar="PATH", help="a .jsonl file, .tar shards, a folder or data.yaml"
    )
    parser.add_argument("--out", metavar="FOLDER", help="where checkpoints and logs go, shared by all nodes")
    parser.add_argument("--model", metavar="MODEL", help="in place of the recipe's, such as a file that has moved")
    parser.add_argument("--config", metavar="FILE", help="the config.json of a model named as package.module:Class")
    parser.add_argument("--weights", metavar="FOLDER", help="start from Hugging Face safetensors")
    parser.add_argument(
        "--processor", metavar="FOLDER", help="of the data (processor() of the model's file, or --weights)"
    )
    parser.add_argument(
        "--resume", default="auto", metavar="WHAT",
        help="auto (default): from the last checkpoint in --out, if any; never; or a run to start from",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="check everything and train nothing")
    options = parser.add_argument_group("training options")
    options.add_argument("--train", metavar="FILE", help="a file with a `train:` section, over that of the recipe")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one option (repeatable)")
    options.add_argument("--steps", type=int, metavar="N", help="same as --set steps=N")
    options.add_argument("--lr", type=float, metavar="X", help="same as --set optimizer.lr=X")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="JSON lines for programs instead of lines to read")
    output.add_argument("--tensorboard", action="store_true", help="event files in OUT/tensorboard")
    output.add_argument("--wandb", metavar="PROJECT", help="a run of Weights & Biases")
    output.add_argument("--profile", type=int, metavar="N", help="step N as a Chrome trace in OUT/profile")
    output.add_argument("--export", metavar="FOLDER", help="at the end, write the model as Hugging Face safetensors")
    machine = parser.add_argument_group("processes")
    machine.add_argument("--nproc", type=int, metavar="N", help="on this node (the recipe's ranks / --nnodes)")
    machine.add_argument("--nnodes", type=int, default=1, metavar="N", help="nodes of the job (1)")
    machine.add_argument("--node-rank", type=int, metavar="N", help="of this node; without it the rendezvous decides")
    machine.add_argument("--rdzv-endpoint", default="", metavar="HOST:PORT", help="of the first node")
    machine.add_argument(
        "--rdzv-id", default="omnicompile", metavar="NAME", help="of the job, where several share a host"
    )
    machine.add_argument("--device", choices=("cuda", "cpu"), help="cuda where there is a GPU")
    machine.add_argument(
        "--backend", metavar="NAME", help="inductor (default on GPUs), step (on CPUs), eager, torch.compile"
    )
    machine.add_argument(
        "--kernels", metavar="LIST", help="such as attention=flash_attn2,rms_norm=liger; omnicompile doctor lists them"
    )


def run(args: argparse.Namespace) -> int:
    from omnicompile.train.launch import is_worker

    if is_worker():
        return _worker(args)
    from omnicompile.recipe import load_recipe
    from omnicompile.train.run import check_request

    plan = load_recipe(args.recipe)
    request = request_of(args)
    check_request(request, plan)
    job_size = _processes(args, plan)
    if args.dry_run:
        from omnicompile.cli.progress import emit
        from omnicompile.train.dry_run import dry_run

        emit(dry_run(request, plan, as_json=args.json))
        return 0
    if plan.mesh.world == 1:
        return _train(request)
    return _launch(args, job_size)


def request_of(args: argparse.Namespace) -> Request:
    from omnicompile.train.run import Request

    sets = list(args.set)
    sets += [f"steps={args.steps}"] if args.steps is not None else []
    sets += [f"optimizer.lr={args.lr}"] if args.lr is not None else []
    return Request(
        recipe=Path(args.recipe), data=args.data, out=None if args.out is None else Path(args.out), model=args.model,
        config=args.config, weights=args.weights, processor=args.processor, resume=args.resume, train=args.train,
        sets=tuple(sets), json=args.json, tensorboard=args.tensorboard, wandb=args.wandb, profile=args.profile,
        export=args.export, device=args.device, backend=args.backend, kernels=args.kernels, dry_run=args.dry_run,
    )  # fmt: skip


def _processes(args: argparse.Namespace, plan: Plan) -> int:
    """On this node. Raises PlanError where they are not the recipe's in all."""
    from omnicompile.train.launch import Job

    world = plan.mesh.world
    Job(args.nproc or 1, args.nnodes, args.node_rank, args.rdzv_endpoint)  # checks the options
    if args.nproc is None and world % args.nnodes:
        raise PlanError(f"the recipe is for {world} processes, which {args.nnodes} nodes do not share evenly")
    here = args.nproc if args.nproc is not None else world // args.nnodes
    if here * args.nnodes != world:
        given = f"--nproc {here}" + (f" x --nnodes {args.nnodes}" if args.nnodes > 1 else "")
        raise PlanError(
            f"the recipe is for {world} processes, and {given} makes {here * args.nnodes}: start as many as it is for, "
            f"or plan again with `omnicompile plan {plan.model} --gpus {here * args.nnodes} --out ...`"
        )
    if args.device != "cpu":
        _check_gpus(here, args.device)
    return here


def _check_gpus(here: int, device: str | None) -> None:
    import torch

    if not torch.cuda.is_available():
        if device == "cuda":
            raise InputError("--device cuda, but torch sees no GPU: use --device cpu")
        return
    if torch.cuda.device_count() < here:
        raise PlanError(
            f"the recipe wants {here} processes on this node, and it has {torch.cuda.device_count()} GPUs: plan for as "
            "many as there are, or spread the job over nodes with --nnodes"
        )


def _launch(args: argparse.Namespace, processes: int) -> int:
    from omnicompile.train.launch import Job, launch

    job = Job(processes, args.nnodes, args.node_rank, args.rdzv_endpoint, args.rdzv_id)
    cause = launch(job, args.command_line, args.debug)
    if cause is None:
        return 0
    if cause.text:
        print(f"error: {cause.text}", file=sys.stderr)
    return cause.code


def _worker(args: argparse.Namespace) -> int:
    """One rank. Its error goes to the launcher, which tells one for all."""
    from omnicompile.train.failures import FOLDER, RankFailure

    if FOLDER not in os.environ:  # started by torchrun itself
        return _train(request_of(args))
    rank, folder = int(os.environ["RANK"]), Path(os.environ[FOLDER])
    try:
        code = _train(request_of(args))
    except Exception as error:
        failure = RankFailure.of(rank, error)
        failure.save(folder)
        if args.debug:
            traceback.print_exc()
        if failure.follows:  # torch would warn of every collective with the rank that is gone
            sys.stdout.flush()
            os._exit(failure.code)
        return failure.code
    if code:  # ended by a signal
        RankFailure(rank, code, "", False, time.time()).save(folder)
    return code


def _train(request: Request) -> int:
    from omnicompile.train.run import train

    gc.enable()  # a run is long enough for its garbage to matter
    return train(request)
