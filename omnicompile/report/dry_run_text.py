"""A dry run beside the plan's prediction."""

from __future__ import annotations

from omnicompile.lowering.dry_run import DryRun
from omnicompile.plan import Plan
from omnicompile.report.units import bytes_text, seconds_text


def dry_run_text(run: DryRun, plan: Plan) -> str:
    """The memory of the real graph includes optimizer state; its time is of one micro-step, without the optimizer."""
    lines = ["", f"Dry run of one rank: {run.nodes:,} operators in its step graph"]
    total = run.peak_bytes + run.optimizer_bytes
    memory, time = "", ""
    if plan.prediction is not None:
        beside = sum(plan.prediction.memory.get(kind, 0.0) for kind in ("context", "allocator slack"))
        memory = f" (predicted {bytes_text(plan.prediction.memory_total - beside)}, without CUDA context and slack)"
        time = f" (predicted {seconds_text(plan.prediction.step_seconds)} for {plan.accumulation} and the optimizer)"
    lines.append(f"  memory       {bytes_text(total)}{memory}, the peak at {run.peak_at}")
    lines.append(f"  micro-step   {seconds_text(run.seconds)}{time}, in the graph's own order, nothing overlapped")
    for (kind, axes), (number, nbytes) in sorted(run.collectives.items()):
        lines.append(f"  {kind:<14} {number:>5} over {axes}, {bytes_text(nbytes)}")
    for kind, seconds in sorted(run.timeline.exposed.items(), key=lambda item: -item[1]):
        lines.append(f"  waiting      {seconds_text(seconds)} for {kind}")
    return "\n".join(lines)
