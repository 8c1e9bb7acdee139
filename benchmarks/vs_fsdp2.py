"""Training steps under OmniCompile beside torch's `fully_shard`: ratios of step time and of peak memory.

The same model, data, layout (parameters over all ranks, each rank its own sequence), loss head (whole logits), dtypes
and optimizer (AdamW) on both sides:

- fully_shard: every layer a unit, gathered again for the backward; "compiled": every layer under torch.compile;
- omnicompile BACKEND: `omnicompile.parallelize` with each backend of docs/runtime.md; "selective": with the policy that
  runs cheap operators again in the backward, as torch.compile does for "compiled" without being asked.

On CPUs two gloo processes of one thread each; on GPUs a process each (NCCL; one GPU is a group of one process). All
contestants live in the same processes and take steps in turns, A B C A B C ..., the order rotated each time. Of each
repeat the ratio to `fully_shard` and to its compiled form is taken; printed are its median and quartiles. Seconds of
one machine mean little: only ratios within one run are compared. Ratios of CPU seconds say how much work is done, also
where others are at work on the machine; they leave out waiting.

Peak memory of a rank is what it keeps between steps (parameters, buffers, optimizer states) and the most that a step
holds beyond that: on CPUs by the profiler's record of every allocation of torch's allocator, which sees operators,
compiled code and collectives alike; on GPUs by torch.cuda.max_memory_allocated.

That both sides do the same is checked: losses of every step are compared (at 1e-4; in bfloat16 at 2e-2, or twice what
torch's own two forms differ by, where they do by more: routing of a mixture flips by a rounding).

With `--host`, models are so small that nearly all of a step is the host's work: what it takes to launch a step. It is
that time in which a GPU waits where it has little to do. One process unless `--ranks` says otherwise.

    python benchmarks/vs_fsdp2.py                      # everything; writes results/vs_fsdp2.{json,md}
    python benchmarks/vs_fsdp2.py --host               # results/vs_fsdp2_host.{json,md}
    python benchmarks/vs_fsdp2.py --models dense --contestants fully_shard "omnicompile step" --json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from plan_time import environment_facts

HERE = Path(__file__).resolve().parent
MODELS = ("dense", "vlm", "moe")
BASES = ("fully_shard", "fully_shard compiled")
OURS = ("step", "inductor", "inductor, selective", "torch.compile", "eager")
CONTESTANTS = (*BASES, *(f"omnicompile {backend}" for backend in OURS))
MIB = 2**20


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of the ratios of one run."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Row:
    """One contestant beside one base: wall time of whole steps, of forward and backward alone, CPU time of whole steps,
    and peak memory, as ratios."""

    model: str
    name: str
    base: str
    step: Spread
    forward_backward: Spread
    cpu: Spread
    peak: float


def spread(ours: list[float], theirs: list[float]) -> Spread:
    """Of the ratios, repeat by repeat. Raises ValueError for unequal numbers of repeats."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    if len(ratios) == 1:
        return Spread(ratios[0], ratios[0], ratios[0])
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Spread(round(median, 4), round(low, 4), round(high, 4))


def compare(model: str, seen: dict[str, dict[str, Any]]) -> list[Row]:
    """Every contestant beside every base that ran. seen: by name, the fields of `fsdp2_contestants.Measured`."""
    rows = []
    for base in (b for b in BASES if b in seen):
        theirs = seen[base]
        for name, ours in seen.items():
            if name != base and (name not in BASES or base == BASES[0]):
                times = (spread(ours[key], theirs[key]) for key in ("step", "backward", "cpu"))
                rows.append(Row(model, name, base, *times, round(ours["peak"] / theirs["peak"], 4)))
    return rows


def loss_difference(seen: dict[str, dict[str, Any]]) -> float:
    """Largest difference of the losses of any two contestants at the same step; inf if numbers of steps differ."""
    losses = [found["losses"] for found in seen.values()]
    if len({len(found) for found in losses}) != 1:
        return math.inf
    return max(max(step) - min(step) for step in zip(*losses))


def allowed_difference(seen: dict[str, dict[str, Any]], gpu: bool) -> float:
    """Of losses. On GPUs torch's own two forms show how far roundings of bfloat16 carry."""
    if not gpu:
        return 1e-4
    own = {name: found for name, found in seen.items() if name in BASES}
    return max(2e-2, 2.0 * loss_difference(own)) if len(own) == len(BASES) else 2e-2


def report(measured: dict[str, dict[str, dict[str, Any]]], facts: dict[str, str], sizes: dict[str, Any]) -> str:
    """Markdown. measured: by model and contestant."""
    lines = ["# Beside fully_shard", "", "Printed by `python benchmarks/vs_fsdp2.py`, which says what is measured how."]
    lines += ["Ratios below 1 mean that OmniCompile is faster, or takes less.", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    rows = [row for model, seen in measured.items() for row in compare(model, seen)]
    for base in BASES:
        chosen = [row for row in rows if row.base == base]
        if not chosen:
            continue
        lines += ["", f"## Relative to {base}", ""]
        lines += [
            "| model | | step: median (quartiles) | forward and backward | CPU time | peak memory |",
            "|---|---|---|---|---|---|",
        ]
        for row in chosen:
            cells = (row.model, row.name, row.step, row.forward_backward, row.cpu, f"{row.peak:.2f}")
            lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "## What was measured", ""]
    lines += ["| model | | median step s | peak MiB | kept MiB | tokens/s per rank | first step s |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for model, seen in measured.items():
        for name, found in seen.items():
            step = statistics.median(found["step"])
            figures = (f"{step:.3f}", f"{found['peak'] / MIB:.1f}", f"{found['held'] / MIB:.1f}")
            tokens = f"{sizes[model]['tokens'] / step:,.0f}"
            lines.append(f"| {model} | {name} | {' | '.join(figures)} | {tokens} | {found['first']:.1f} |")
    lines += ["", "First step: from the model to the end of the first step, capture and compilation included."]
    lines += [f"{model}: losses of all contestants within {loss_difference(s):.1e}" for model, s in measured.items()]
    return "\n".join(lines) + "\n"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def chosen(models: list[str], asked: list[str] | None) -> dict[str, list[str]]:
    """Contestants by model, `fully_shard` first. By default the whole graph is compiled for the first model only: that
    takes longer than all else."""
    if asked is not None:
        names = [BASES[0], *(name for name in asked if name != BASES[0])]
        return dict.fromkeys(models, names)
    fewer = [name for name in CONTESTANTS if name != "omnicompile torch.compile"]
    return {model: list(CONTESTANTS) if model == MODELS[0] else fewer for model in models}


def run(names: dict[str, list[str]], repeats: int, ranks: int, sizes: str) -> dict[str, dict[str, dict[str, Any]]]:
    """What rank 0 of `ranks` fresh processes measured, by model and contestant. names: contestants by model. sizes:
    "cpu", "gpu" or "host"."""
    import torch.multiprocessing as mp
    from fsdp2_contestants import run_rank

    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, (ranks, _free_port(), names, repeats, sizes, folder), nprocs=ranks)
        return {model: json.loads((Path(folder) / f"{model}.json").read_text()) for model in names}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, help="default: all")
    parser.add_argument("--repeats", type=int, default=11, help="timed steps of each (default 11, at least 7)")
    parser.add_argument(
        "--ranks", type=int, help="processes (default: 2 on CPUs, one for each GPU, at most 8; 1 with --host)"
    )
    parser.add_argument("--host", action="store_true", help="models so small that a step takes what its host takes")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of the report")
    parser.add_argument("--out", type=Path, help="where the results go (default: benchmarks/results, if all was run)")
    args = parser.parse_args()
    if args.repeats < 7:
        parser.error("--repeats: at least 7, or medians and quartiles mean nothing")
    import torch
    from fsdp2_contestants import SIZES

    gpu = torch.cuda.is_available()
    which = "host" if args.host else "gpu" if gpu else "cpu"
    sizes = {model: asdict(SIZES[which][model]) for model in args.models}
    ranks = args.ranks or (1 if args.host else min(torch.cuda.device_count(), 8) if gpu else 2)
    facts = environment_facts() | {"load before": f"{os.getloadavg()[0]:.1f}"}
    device = f"{ranks} x {torch.cuda.get_device_name()}, NCCL, bfloat16" if gpu else f"{ranks} with gloo, float32"
    facts |= {"processes": device, "repeats": str(args.repeats)}
    facts |= {f"size of {model}": ", ".join(f"{k} {v}" for k, v in size.items()) for model, size in sizes.items()}
    started = time.perf_counter()
    measured = run(chosen(args.models, args.contestants), args.repeats, ranks, which)
    facts["duration"] = f"{time.perf_counter() - started:.0f} s"
    rows = [asdict(row) for model, seen in measured.items() for row in compare(model, seen)]
    differences = {model: loss_difference(seen) for model, seen in measured.items()}
    data = {"environment": facts, "ratios": rows, "loss_difference": differences, "measured": measured}
    text = report(measured, facts, sizes)
    print(json.dumps(data) if args.json else text)
    everything = set(args.models) == set(MODELS) and args.contestants is None
    out = args.out or (HERE / "results" if everything else None)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        name = "vs_fsdp2_host" if args.host else "vs_fsdp2"
        (out / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
        (out / f"{name}.md").write_text(text)
    wrong = [m for m, found in differences.items() if not found <= allowed_difference(measured[m], gpu)]
    for model in wrong:
        text = f"the contestants do not compute the same: losses differ by {differences[model]:.1e}"
        print(f"{model}: {text}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
