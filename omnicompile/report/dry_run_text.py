"""A dry run beside the plan's prediction."""

from __future__ import annotations

from omnicompile.lowering.dry_run import DryRun
from omnicompile.plan import Plan
from omnicompile.report.units import bytes_text, seconds_text


def dry_run_text(run: DryRun, plan: Plan) -> str:
    """Memory and time of the real graph; optimizer state, sums over replicas and the update are added by arithmetic."""
    lines = ["", f"Dry run of one rank: {run.nodes:,} operators in its step graph, {run.kernels:,} kernels"]
    total, seconds = run.peak_bytes + run.optimizer_bytes, run.step_seconds(plan.accumulation)
    memory, time = "", ""
    if plan.prediction is not None:
        beside = sum(plan.prediction.memory.get(kind, 0.0) for kind in ("context", "allocator slack"))
        predicted = plan.prediction.memory_total - beside
        memory = (
            f" ({_beside(total, predicted)} than the plan's {bytes_text(predicted)} without CUDA context and slack)"
        )
        expected = plan.prediction.step_seconds
        time = f" ({_beside(seconds, expected)} than the plan's {seconds_text(expected)})"
    lines.append(f"  memory       {bytes_text(total)}{memory}, the peak at {run.peak_at}")
    lines.append(f"  step         {seconds_text(seconds)}{time}")
    which = "a micro-step" if plan.accumulation == 1 else "the last micro-step"
    for (kind, axes), (number, nbytes) in sorted(run.collectives.items()):
        lines.append(f"  {kind:<14} {number:>5} over {axes}, {bytes_text(nbytes)} {which}")
    for kind, waiting in sorted(run.timeline.exposed.items(), key=lambda item: -item[1]):
        lines.append(f"  waiting      {seconds_text(waiting)} for {kind} a micro-step")
    return "\n".join(lines)


def _beside(found: float, expected: float) -> str:
    return f"{abs(found / expected - 1):.1%} {'more' if found >= expected else 'less'}"
