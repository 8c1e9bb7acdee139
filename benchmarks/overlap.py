"""What each overlap pass hides: simulated step of one rank's real scheduled graph at full size, without a GPU.

    python benchmarks/overlap.py examples/qwen2_vl_72b.py --gpus 128 --seq-len 32768
    python benchmarks/overlap.py --all --out benchmarks/results/overlap.md

The plan is the planner's, or that of --pin and --recipe; each line runs it with other passes. hidden: the share of the
communication's seconds beside which the compute stream works. peak: of parameters, gradients and activations.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter

from omnicompile.capture.source import load_model_source
from omnicompile.cluster import Cluster
from omnicompile.lowering.dry_run import DryRun, dry_run_program
from omnicompile.lowering.full_size import full_batch, full_program
from omnicompile.passes import lower_forward
from omnicompile.plan import Overlap, Plan, Sharding
from omnicompile.planner.api import plan_source
from omnicompile.recipe import parse_pins
from omnicompile.workload import Workload

CASES = (
    ("examples/qwen2_vl_72b.py", 32768),
    ("examples/qwen2_vl_72b.py", 98304),
    ("benchmarks/models/omni_moe_30b_a3b.py", 32768),
    ("benchmarks/models/omni_moe_30b_a3b.py", 131072),
)
GPUS = 128
NONE = Overlap(exchanges=False)


@dataclass(frozen=True)
class Line:
    """Seconds of an optimizer step; communication and hidden: of its collectives."""

    passes: str
    step: float
    compute: float
    communication: float
    hidden: float
    peak_bytes: int
    nodes: int
    trace_seconds: float

    @property
    def share(self) -> float:
        return self.hidden / self.communication if self.communication else 1.0


def pass_sets(plan: Plan, experts: bool) -> Iterator[tuple[str, Overlap]]:
    """Name and passes: none, each alone on top of the exchanges' schedule, and all together. Those that the plan has
    nothing for are left out."""
    everything: dict[str, int | bool] = {}
    yield "none", NONE
    yield "exchanges", Overlap()
    if plan.mesh.sp > 1:
        everything["head_groups"] = 2
        yield "+ head groups 2", Overlap(head_groups=2)
    if experts:
        everything["expert_chunks"] = 4
        yield "+ expert chunks 2", Overlap(expert_chunks=2)
        yield "+ expert chunks 4", Overlap(expert_chunks=4)
    whole = any(b.sharding is Sharding.REPLICATE and not b.frozen for b in plan.blocks.values())
    hybrid = plan.mesh.dp_replicate > 1 and any(b.sharding is Sharding.HSDP for b in plan.blocks.values())
    if whole or hybrid:
        everything["replica_sums"] = True
        yield "+ replica sums", Overlap(replica_sums=True)
    yield "+ prefetch 2", Overlap(prefetch=2)
    if len(everything) > 1:
        yield "all", Overlap(**everything)  # type: ignore[arg-type]


def line_of(name: str, run: DryRun, plan: Plan, seconds: float) -> Line:
    """The step of `plan.accumulation` micro-steps, what follows them exposed."""
    weights = ((run.timeline, plan.accumulation - 1), (run.last, 1))
    talking = sum(n * timeline.busy[stream] for timeline, n in weights for stream in ("intra", "inter"))
    exposed = sum(n * sum(timeline.exposed.values()) for timeline, n in weights)
    return Line(
        name,
        run.step_seconds(plan.accumulation),
        sum(n * timeline.busy["compute"] for timeline, n in weights) + run.update_seconds,
        talking + run.replica_seconds,
        max(0.0, talking - exposed),
        run.peak_bytes,
        run.nodes,
        seconds,
    )


def lines_of(model: str, seq_len: int, gpus: int, pins: dict[str, str], only: str = "") -> tuple[Plan, list[Line]]:
    source = load_model_source(model, None)
    workload = Workload(seq_len=seq_len)
    plan = plan_source(source, Cluster(gpus=gpus), workload, pins).plans[0]
    built = source.build_meta().train()
    before = full_program(built, full_batch(source, built, plan.workload, plan.micro_batch), plan)
    lines: list[Line] = []
    for name, overlap in pass_sets(plan, plan.mesh.ep > 1):
        if only and name not in only.split(","):
            continue
        start = perf_counter()
        program = lower_forward(replace(before.before, overlap=overlap))
        run = dry_run_program(program, before.host, plan.cluster, plan.accumulation)
        lines.append(line_of(name, run, plan, perf_counter() - start))
        print(text_of(lines[-1]), file=sys.stderr, flush=True)
    return plan, lines


def text_of(line: Line) -> str:
    return (
        f"| {line.passes} | {line.step:.3f} s | {line.compute:.3f} s | {line.communication:.3f} s "
        f"| {line.share:.1%} | {line.step / max(line.compute, line.communication) - 1:.1%} "
        f"| {line.peak_bytes / 2**30:.2f} GiB | {line.nodes:,} |"
    )


def table(model: str, seq_len: int, plan: Plan, lines: list[Line]) -> str:
    mesh = ", ".join(f"{k} {v}" for k, v in vars(plan.mesh).items() if v > 1)
    blocks = "; ".join(f"{name}: {b.sharding}, {b.layout}, recompute {b.recompute}" for name, b in plan.blocks.items())
    head = (
        f"### {Path(model).stem}, {seq_len:,} tokens, {plan.cluster.gpus} {plan.cluster.gpu}\n\n{mesh}; {blocks}; "
        f"micro-batch {plan.micro_batch} x {plan.accumulation}\n\n"
        "| passes | step | compute | communication | hidden | over the larger of both | peak | nodes |\n"
        "|---|---|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(map(text_of, lines)) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--gpus", type=int, default=GPUS)
    parser.add_argument("--seq-len", type=int, default=32768)
    parser.add_argument("--pin", action="append", default=[], help="as for `omnicompile plan`")
    parser.add_argument("--only", default="", help="names of pass sets, with commas between")
    parser.add_argument("--all", action="store_true", help="the four cases at 128 GPUs")
    parser.add_argument("--out", type=Path, help="also written here, and as JSON beside it")
    options = parser.parse_args()
    if not options.all and options.model is None:
        parser.error("give a model, or --all")
    cases = CASES if options.all else ((options.model, options.seq_len),)
    texts, data = [], []
    for model, seq_len in cases:
        plan, lines = lines_of(model, seq_len, options.gpus, parse_pins(options.pin), options.only)
        texts.append(table(model, seq_len, plan, lines))
        data.append({"model": model, "seq_len": seq_len, "gpus": options.gpus, "lines": [asdict(x) for x in lines]})
        print(texts[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(["# Communication hidden by each overlap pass\n", *texts]))
        options.out.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
