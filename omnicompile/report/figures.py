"""What a report says of a Plan beyond the Plan's own fields; the terminal and the JSON view share it."""

from __future__ import annotations

from omnicompile.plan import BlockPlan, Layout, Mesh, Plan, Prediction
from omnicompile.program import Program, Segment

LAYOUT_WORDS = {
    Layout.BATCH: "own batch",
    Layout.REPLICATED: "replicated",
    Layout.SEQUENCE: "sequence",
    Layout.IMAGES: "whole images",
}


def gpu_hours_per_billion_tokens(prediction: Prediction) -> float | None:
    """GPU-hours to train on 1e9 tokens (text and placeholders)."""
    rate = prediction.tokens_per_second_per_gpu
    return 1e9 / (rate * 3600) if rate > 0 else None


def cost_per_billion_tokens(plan: Plan) -> float | None:
    """In the units of the cluster's price, None without one."""
    hours = None if plan.prediction is None else gpu_hours_per_billion_tokens(plan.prediction)
    price = plan.cluster.price_per_gpu_hour
    return None if hours is None or price is None else hours * price


def active_fraction(segment: Segment) -> float:
    """Share of the segment's expert parameters that one token uses."""
    shapes = [op.experts for op in segment.ops if op.experts is not None]
    return shapes[0].top_k / shapes[0].experts if shapes else 1.0


def active_param_count(program: Program) -> int:
    """Parameters that work on one token: of the experts, top_k out of all."""
    total = 0.0
    for segment in program.segments:
        experts = segment.expert_param_count
        total += segment.count * (segment.param_count - experts + experts * active_fraction(segment))
    return round(total)


def block_params(program: Program, block: str) -> int:
    return sum(segment.param_count * segment.count for segment in program.block_segments(block))


def mesh_words(mesh: Mesh) -> str:
    """dp_shard 32 x sp 4; degrees of 1 are left out, ep stands apart because it is folded out of dp_shard x sp."""
    degrees = {
        "pp": mesh.pp,
        "dp_replicate": mesh.dp_replicate,
        "dp_shard": mesh.dp_shard,
        "sp": mesh.sp,
        "cp": mesh.cp,
        "tp": mesh.tp,
    }
    words = " x ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1) or "one rank"
    return words + (f", ep {mesh.ep}" if mesh.ep > 1 else "")


def block_words(block: BlockPlan, other: BlockPlan) -> str:
    """Choices of `block` that `other` does not share; sp and ep only as split or not (the mesh says how far)."""
    words = []
    if block.sharding != other.sharding:
        words.append(block.sharding.value)
    if block.layout != other.layout:
        words.append(LAYOUT_WORDS[block.layout])
    if (block.ep > 1) != (other.ep > 1):
        words.append(f"ep {block.ep}")
    if block.recompute != other.recompute:
        words.append(f"recompute {block.recompute.value}")
    if block.reshard != other.reshard:
        words.append("parameters gathered again" if block.reshard else "parameters kept gathered")
    if block.offload != other.offload:
        words.append("offload" if block.offload else "no offload")
    return ", ".join(words)


def differences(plan: Plan, best: Plan) -> list[str]:
    """Where `plan` chose otherwise than `best`, the mesh first."""
    words = []
    if plan.mesh != best.mesh:
        words.append(mesh_words(plan.mesh))
    if (plan.micro_batch, plan.accumulation) != (best.micro_batch, best.accumulation):
        words.append(f"micro-batch {plan.micro_batch} x {plan.accumulation}")
    if plan.loss_head != best.loss_head:
        words.append(f"{plan.loss_head.value} loss head")
    if plan.offload_optimizer != best.offload_optimizer:
        words.append("optimizer " + ("offloaded" if plan.offload_optimizer else "not offloaded"))
    for name, block in plan.blocks.items():
        if changed := block_words(block, best.blocks.get(name, BlockPlan())):
            words.append(f"{name} {changed}")
    return words


def step_parts(prediction: Prediction) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds that make up the step, and seconds of communication hidden behind them, each largest first."""
    hidden = {name: value for name, value in prediction.time.items() if name.startswith("hidden ") and value > 0}
    shown = {name: value for name, value in prediction.time.items() if not name.startswith("hidden ") and value > 0}
    return _largest_first(shown), _largest_first(hidden)


def _largest_first(values: dict[str, float]) -> dict[str, float]:
    return dict(sorted(values.items(), key=lambda item: -item[1]))
