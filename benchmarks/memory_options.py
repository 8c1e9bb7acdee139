"""What each memory option saves: predicted, by liveness of the rank's graph, and measured.

Every option is added to a base plan of the same model (FSDP over two ranks, nothing recomputed, whole loss head, all on
the device), and the difference of peak memory between the two is compared:

- predicted: `planner.predict.simulate` on a calibrated hardware file, all kinds without context and allocator slack;
- liveness: `lowering.dry_run`, the peak of a walk over the kernels of the rank's own graph, with Adam's moments;
- measured: two gloo processes of one thread, float32, through `omnicompile.parallelize` with the backend "inductor":
  what a rank keeps on the device between steps, and the most that a step holds beyond that, by the profiler's record of
  every allocation of torch's allocator; the highest rank's, median of three steps.

On a CPU the "device" is torch's CPU allocator. Offloaded activations, master weights and gradients on the host are in
shared anonymous memory (passes/offload_op.py), which that allocator does not know; Adam's moments, which torch.optim
makes beside the master weights, are counted by where these are.

Losses of every step are compared with the base plan's: 0 means that they are equal to the bit.

    python benchmarks/memory_options.py  # everything; writes results/memory_options.md
    python benchmarks/memory_options.py --options "recompute full" --hardware my.yaml
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plan_time import environment_facts

if TYPE_CHECKING:
    from executed_plans import Case

    from omnicompile.plan import Plan

HERE = Path(__file__).resolve().parent
CALIBRATED = HERE / "results" / "simulated_vs_executed.json"
MIB = 2**20
GOAL = 0.10
STEPS = 3


@dataclass(frozen=True)
class Option:
    """A change of the base plan of `model` (see `models`)."""

    name: str
    model: str
    change: Callable[[Plan], Plan] = field(compare=False)


def models() -> dict[str, Case]:
    """By name: one whose activations, one whose logits, and one whose optimizer takes most of the memory."""
    from executed_plans import Case
    from fsdp2_contestants import Size

    from omnicompile.plan import Mesh

    sizes = {
        "deep": (Size(256, 6, 512, 2048, head=64), 2),
        "wide vocabulary": (Size(64, 2, 512, 4096, head=32), 32),
        "short": (Size(512, 4, 256, 2048, head=64), 1),
    }
    cases = [Case(name, name, "dense", size, Mesh(dp_shard=2), rows=rows) for name, (size, rows) in sizes.items()]
    images = Case("images", "images", "vlm", Size(256, 4, 512, 2048, 1024, head=64), Mesh(dp_shard=2), rows=1)
    return {case.name: case for case in (*cases, images)}


def options() -> list[Option]:
    from omnicompile.plan import LossHead
    from omnicompile.recompute import Recompute

    def blocks(**choices: Any) -> Callable[[Plan], Plan]:
        return lambda plan: replace(plan, blocks={n: replace(b, **choices) for n, b in plan.blocks.items()})

    def both(plan: Plan) -> Plan:
        return replace(blocks(recompute=Recompute.SELECTIVE, offload=True)(plan), offload_optimizer=True)

    return [
        *(Option(f"recompute {p}", "deep", blocks(recompute=p)) for p in list(Recompute)[1:]),
        Option("chunked loss head", "wide vocabulary", lambda plan: replace(plan, loss_head=LossHead.CHUNKED)),
        Option("activation offload", "deep", blocks(offload=True)),
        Option("activation offload, selective", "deep", blocks(offload=True, recompute=Recompute.SELECTIVE)),
        Option("activation offload, images", "images", blocks(offload=True)),
        Option("optimizer offload", "short", lambda plan: replace(plan, offload_optimizer=True)),
        Option("selective, both offloads", "deep", both),
    ]


@dataclass
class Peaks:
    """Bytes of one plan, and losses of its steps."""

    predicted: float = 0.0
    liveness: float = 0.0
    measured: float = 0.0
    losses: list[float] = field(default_factory=list)


# Predicted ------------------------------------------------------------------------------------------------------------


class Forecast:
    """Peaks by the cost model and by liveness; a model is captured once. hardware: path of the calibrated file."""

    def __init__(self, hardware: str) -> None:
        self.hardware = hardware
        self._programs: dict[str, Any] = {}

    def __call__(self, case: Case, plan: Plan) -> Peaks:
        from executed_plans import tensor_bytes
        from fsdp2_contestants import build_model

        from omnicompile.capture.api import capture_model
        from omnicompile.lowering.dry_run import dry_run
        from omnicompile.planner.predict import simulate

        if case.name not in self._programs:
            self._programs[case.name] = capture_model(build_model(case.kind, case.size), case.workload())
        found = simulate(self._programs[case.name], plan).prediction
        assert found is not None
        run = dry_run(build_model(case.kind, case.size).to("meta"), case.batch(0), plan)
        return Peaks(tensor_bytes(found), run.peak_bytes + run.optimizer_bytes)


# Measured -------------------------------------------------------------------------------------------------------------


def measure(case: Case, plan: Plan, backend: str) -> tuple[int, list[float]]:
    """(peak bytes of the highest rank, losses of all steps), in each rank."""
    import torch
    import torch.distributed as dist
    from fsdp2_contestants import build_model, parallelized

    from omnicompile.calibration.allocations import allocated_peak

    batch = case.batch(dist.get_rank())
    module = parallelized(build_model(case.kind, case.size), plan, torch.device("cpu"), batch, backend)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    losses = []

    def step() -> None:
        loss = module(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    step()
    step()
    gc.collect()
    peaks = []
    for _ in range(STEPS):
        peak = torch.tensor(on_device(module, optimizer, plan) + allocated_peak(step))
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        peaks.append(int(peak))
    return int(statistics.median(peaks)), losses


def on_device(module: Any, optimizer: Any, plan: Plan) -> int:
    """Bytes kept on the device between steps."""
    from torch import Tensor

    states = [] if plan.offload_optimizer else optimizer.state.values()
    moments = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    tensors = [*module.store.weights().values(), *module.buffers(), *moments]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def run_rank(rank: int, world: int, port: int, names: list[str], backend: str, folder: str) -> None:
    """What each spawned process does; rank 0 writes what was measured, by (model, option)."""
    import torch
    import torch.distributed as dist

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    try:
        for name, (case, plan) in plans(names, "h100").items():
            found[name] = measure(case, plan, backend)
            torch.compiler.reset()
            gc.collect()
            if rank == 0:
                print(f"{name}: {found[name][0] / MIB:.1f} MiB", file=sys.stderr, flush=True)
        if rank == 0:
            (Path(folder) / "measured.json").write_text(json.dumps(found))
    finally:
        dist.destroy_process_group()


def plans(names: list[str], gpu: str) -> dict[str, tuple[Case, Plan]]:
    """The options' plans by their names, and those of their base by "base MODEL"."""
    known, found = models(), {}
    for option in options():
        if option.name in names:
            case = known[option.model]
            base = case.plan(gpu, "float32")
            found[f"base {option.model}"] = (case, base)
            found[option.name] = (case, option.change(base))
    return found


def run(names: list[str], backend: str, folder: str) -> dict[str, tuple[int, list[float]]]:
    import torch.multiprocessing as mp

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    mp.spawn(run_rank, (2, port, names, backend, folder), nprocs=2)
    found: dict[str, tuple[int, list[float]]] = json.loads((Path(folder) / "measured.json").read_text())
    return found


# Report ---------------------------------------------------------------------------------------------------------------


def report(found: dict[str, Peaks], names: list[str], facts: dict[str, str]) -> tuple[str, bool]:
    """(Markdown, whether every option is within the goals)"""
    lines = ["# What memory options save", ""]
    lines += ["Printed by `python benchmarks/memory_options.py`, which says what is measured how. MiB of a rank.", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    lines += ["", "| option | model | base peak | predicted saving | liveness saving | measured saving |"]
    lines[-1] += " predicted / measured | loss |"
    lines.append("|---" * 8 + "|")
    reached = 0
    for option in [option for option in options() if option.name in names]:
        base, with_it = found[f"base {option.model}"], found[option.name]
        predicted, liveness, measured = (
            getattr(base, kind) - getattr(with_it, kind) for kind in ("predicted", "liveness", "measured")
        )
        difference = max(abs(a - b) for a, b in zip(base.losses, with_it.losses, strict=True))
        ratio = predicted / measured
        reached += abs(ratio - 1.0) <= GOAL and difference <= 1e-5
        sizes = [f"{value / MIB:.1f}" for value in (base.measured, predicted, liveness, measured)]
        lines.append(f"| {option.name} | {option.model} | {' | '.join(sizes)} | {ratio:.2f} | {difference:.1g} |")
    lines += ["", f"- {reached} of {len(names)} save what was predicted within {GOAL:.0%} and train alike within 1e-5"]
    lines += ["", "Peaks:", "", "| plan | predicted | liveness | measured |", "|---" * 4 + "|"]
    for name, peaks in found.items():
        sizes = [f"{value / MIB:.1f}" for value in (peaks.predicted, peaks.liveness, peaks.measured)]
        lines.append(f"| {name} | {' | '.join(sizes)} |")
    return "\n".join(lines) + "\n", reached == len(names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [option.name for option in options()]
    parser.add_argument("--options", nargs="+", metavar="NAME", help=f"of {', '.join(known)} (default: all)")
    parser.add_argument("--hardware", type=Path, help="a calibrated hardware file (default: that of the last results)")
    parser.add_argument("--backend", choices=("inductor", "step"), default="inductor")
    parser.add_argument("--forecast", action="store_true", help="predict only, measure nothing")
    args = parser.parse_args()
    names = args.options or known
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--options: no option {unknown[0]!r}; there are {', '.join(known)}")
    with tempfile.TemporaryDirectory() as folder:
        hardware = args.hardware or Path(folder) / "cpu.yaml"
        if args.hardware is None:
            hardware.write_text(json.loads(CALIBRATED.read_text())["hardware"])
        forecast = Forecast(str(hardware))
        found = {}
        for name, chosen in plans(names, str(hardware)).items():
            found[name] = forecast(*chosen)
            sizes = f"{found[name].predicted / MIB:.1f} MiB, by liveness {found[name].liveness / MIB:.1f} MiB"
            print(f"{name}: predicted {sizes}", file=sys.stderr, flush=True)
        if args.forecast:
            return 0
        for name, (peak, losses) in run(names, args.backend, folder).items():
            found[name].measured, found[name].losses = peak, losses
    facts = environment_facts() | {"processes": "2 gloo processes of one thread, float32", "backend": args.backend}
    text, reached = report(found, names, facts)
    print(text)
    if args.options is None and args.hardware is None:
        (HERE / "results" / "memory_options.md").write_text(text)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
