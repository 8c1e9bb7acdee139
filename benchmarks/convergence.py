"""Whether the omni models learn, and learn the same on one process and on several.

    python benchmarks/convergence.py                                  # all three models on 1 and 4 processes
    python benchmarks/convergence.py --models janus --processes 1 2 --steps 200

Each model trains on tasks made here (convergence_data.py): to name what is in text, pictures, videos and sounds, and to
draw pictures by name. On several processes it runs under FSDP, sequence parallelism where there are four, and expert
parallelism where it has experts. Written to benchmarks/results/: the losses of the language model and of the image
decoder by step (convergence.json, convergence.png), how often generated text and pictures are right (convergence.md),
and pictures that the trained models drew (convergence_samples.png).
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
from convergence_evaluation import Drawn, Score, evaluate
from convergence_models import GROUPS, MODELS, build_model, full_batch, make_plan, micro_batch
from convergence_report import Run, write_results
from torch import nn

import omnicompile
from omnicompile import omni
from omnicompile.omni import OmniModel
from omnicompile.runtime.plain_module import PlainModule

LEARNING_RATE, WARMUP, LARGEST_NORM = 3e-3, 20, 1.0
Curve = list[dict[str, float]]
RESULTS = Path(__file__).parent / "results"


def step_size(step: int, steps: int) -> float:
    """Warm-up, then down to zero along half a cosine."""
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(module: Any, model: OmniModel, groups: range, steps: int, told: bool) -> Curve:
    """The losses of every step; `groups`: whose micro-batches this process runs."""
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    curve, began = [], time.perf_counter()
    for step in range(steps):
        micro = [micro_batch(model, step, group) for group in groups]
        targets = module.count_targets(micro)
        losses: dict[str, float] = {}
        for number, batch in enumerate(micro):
            with module.accumulate(last=number == len(micro) - 1, targets=targets):
                output = module(**batch)
                output.loss.backward()
            for name, loss in output.losses.items():
                losses[name] = losses.get(name, 0.0) + loss.item()
        module.clip_grad_norm_(LARGEST_NORM)
        for group in optimizer.param_groups:
            group["lr"] = step_size(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(losses)
        if told and (step + 1) % 50 == 0:
            text = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
            print(f"  step {step + 1}: {text} ({(time.perf_counter() - began) / (step + 1):.2f} s a step)", flush=True)
    return curve


def run_one(rank: int, world: int, name: str, steps: int, prompts: int) -> tuple[Curve, list[Score], list[Drawn]]:
    """Train and evaluate `name` as process `rank` of `world`; scores and pictures on rank 0."""
    model = build_model(name).train()
    if world == 1:
        module: nn.Module = PlainModule(model)
        curve = train(module, model, range(GROUPS), steps, True)
    else:
        plan = make_plan(model, name, world)
        module = omnicompile.parallelize(model, plan, "cpu", example_batch=full_batch(model))
        group = rank // plan.mesh.sp
        curve = train(module, model, range(group, group + 1), steps, rank == 0)
        omni.gather_into(model, module)
    scores, pictures = evaluate(model.eval(), prompts) if rank == 0 else ([], [])
    return curve, scores, pictures


def _process(rank: int, world: int, port: int, name: str, steps: int, prompts: int, folder: str) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank)
    )
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo")
    result = run_one(rank, world, name, steps, prompts)
    if rank == 0:
        torch.save(result, os.path.join(folder, "result.pt"))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def run(name: str, world: int, steps: int, prompts: int) -> Run:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    print(f"{name} on {world} processes", flush=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (world, port, name, steps, prompts, folder), nprocs=world)
        curve, scores, pictures = torch.load(os.path.join(folder, "result.pt"), weights_only=False)
    return Run(name, world, curve, scores, pictures, time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 4], choices=(1, 2, 4))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--prompts", type=int, default=64, help="of each task, to evaluate with")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    runs = []
    for name in options.models:
        for world in options.processes:
            runs.append(run(name, world, options.steps, options.prompts))
            write_results(runs, options.out)
    failures = [line for line in write_results(runs, options.out) if line]
    print("\n".join(failures) or "all curves agree, all losses fall, all tasks are learned")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
