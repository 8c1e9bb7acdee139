"""Whether the omni models learn, and learn the same on one process and on several.

    python benchmarks/convergence.py                                  # all three models on 1 and 4 processes
    python benchmarks/convergence.py --models janus --processes 1 2 --steps 200

Each model trains, in float64, on tasks made here (convergence_data.py): to name what is in text, pictures, videos and
sounds, and to draw pictures by name. On several processes it runs under FSDP, where there are four with sequence
parallelism, and with expert parallelism where it has experts.

Written to benchmarks/results/: the losses of the language model and of the image decoder by step (convergence.json,
convergence.png), how often generated text and pictures are right (convergence.md), and pictures that the trained models
drew (convergence_samples.png). Runs in convergence.json stay there until the same model is run again on as many
processes. Exits with 1 if a curve differs, a loss does not fall, a task is not learned, or a run is missing.
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from convergence_data import TASKS
from convergence_evaluation import evaluate
from convergence_models import GROUPS, MODELS, build_model, full_batch, initial_weights, make_plan, micro_batch
from convergence_precision import NothingInFloat32
from convergence_report import failures, write_report
from convergence_runs import Drawn, Run, Score, Setup, load_runs, merged, save_runs
from torch import nn

import omnicompile
from omnicompile import omni
from omnicompile.omni import OmniModel
from omnicompile.runtime.plain_module import PlainModule

Curve = list[dict[str, float]]
Result = tuple[Curve, list[Score], list[Drawn]]
RESULTS = Path(__file__).parent / "results"


def step_size(step: int, setup: Setup) -> float:
    """Warm-up, then down to zero along half a cosine."""
    rise = min(1.0, (step + 1) / setup.warmup)
    return setup.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * step / setup.steps))


def train(module: Any, model: OmniModel, groups: range, setup: Setup, told: bool) -> Curve:
    """The losses of every step; `groups`: whose micro-batches this process runs."""
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, eps=setup.epsilon, weight_decay=0.0, fused=True)
    curve, began = [], time.perf_counter()
    for step in range(setup.steps):
        micro = [micro_batch(model, step, group) for group in groups]
        targets = (
            module.count_targets(micro) if len(micro) > 1 else None
        )  # one alone is normalised by all ranks' anyway
        losses: dict[str, float] = {}
        for number, batch in enumerate(micro):
            with module.accumulate(last=number == len(micro) - 1, targets=targets):
                output = module(**batch)
                output.loss.backward()
            for name, loss in output.losses.items():
                losses[name] = losses.get(name, 0.0) + loss.item()
        module.clip_grad_norm_(setup.largest_norm)
        for group in optimizer.param_groups:
            group["lr"] = step_size(step, setup)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(losses)
        if told and (step + 1) % 20 == 0:
            text = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
            print(f"  step {step + 1}: {text} ({(time.perf_counter() - began) / (step + 1):.2f} s a step)", flush=True)
    return curve


def run_one(rank: int, world: int, name: str, setup: Setup, prompts: int, weights: Path) -> Result:
    """Train and evaluate `name` as process `rank` of `world`; scores and pictures on rank 0."""
    with NothingInFloat32():
        model = build_model(name, getattr(torch, setup.dtype), weights).train()
        if world == 1:
            module: nn.Module = PlainModule(model)
            curve = train(module, model, range(GROUPS), setup, True)
        else:
            plan = make_plan(model, name, world)
            module = omnicompile.parallelize(model, plan, "cpu", example_batch=full_batch(model))
            group = rank // plan.mesh.sp
            curve = train(module, model, range(group, group + 1), setup, rank == 0)
            omni.gather_into(model, module)
        scores, pictures = evaluate(model.eval(), prompts) if rank == 0 else ([], [])
    return curve, scores, pictures


def _process(rank: int, world: int, port: int, name: str, setup: Setup, prompts: int, folder: str) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank)
    )
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo")
    result = run_one(rank, world, name, setup, prompts, Path(folder, "weights.pt"))
    if rank == 0:
        torch.save(result, os.path.join(folder, "result.pt"))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def run(name: str, world: int, setup: Setup, prompts: int) -> Run:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    print(f"{name} on {world} process{'es' * (world > 1)}, {setup}", flush=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        torch.save(initial_weights(name), Path(folder, "weights.pt"))
        mp.spawn(_process, (world, port, name, setup, prompts, folder), nprocs=world)
        curve, scores, pictures = torch.load(os.path.join(folder, "result.pt"), weights_only=False)
    return Run(name, world, setup, curve, scores, pictures, time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 4], choices=(1, 2, 4))
    parser.add_argument("--steps", type=int, default=Setup.steps)
    parser.add_argument("--dtype", choices=("float64", "float32"), default=Setup.dtype)
    parser.add_argument("--prompts", type=int, default=64, help="of each task, to evaluate with")
    parser.add_argument("--report-only", action="store_true", help="of the runs that are there, without further ones")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if odd := [task.answers for task in TASKS if options.prompts % task.answers]:
        parser.error(f"--prompts must be a multiple of {max(odd)}, so that every answer is asked for equally often")
    options.out.mkdir(parents=True, exist_ok=True)
    file, setup = options.out / "convergence.json", Setup(options.steps, options.dtype)
    runs = load_runs(file)
    for name in [] if options.report_only else options.models:
        for world in options.processes:
            runs = merged(runs, [run(name, world, setup, options.prompts)])
            save_runs(runs, file)
            write_report(runs, options.out, options.models)
    write_report(runs, options.out, options.models)
    found = failures(runs, options.models)
    print("\n".join(found) or "all curves agree, all losses fall, all tasks are learned")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
