"""What a report says of a Plan beyond the Plan's own fields; the terminal, the JSON view and the page share it."""

from __future__ import annotations

from dataclasses import fields

from omnicompile.cluster import Cluster
from omnicompile.plan import BlockPlan, Layout, Mesh, Overlap, Plan, Prediction, Sharding, Stack
from omnicompile.program import Program, Segment
from omnicompile.report.units import count_text, plural

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


def rank_words(mesh: Mesh) -> str:
    """dp_shard 32 x sp 4 = 128 ranks."""
    words = mesh_words(mesh)
    return f"{words} = {mesh.world:,} ranks" if mesh.world > 1 else words


def cluster_words(cluster: Cluster) -> str:
    """128 x h100 (16 nodes of 8)."""
    nodes = "1 node" if cluster.nodes == 1 else f"{cluster.nodes} nodes of {cluster.gpus_per_node}"
    return f"{cluster.gpus:,} x {cluster.gpu} ({nodes})"


def model_words(program: Program) -> str:
    """The model's name, its parameters, and those that work on one token."""
    total, active = program.param_count, active_param_count(program)
    words = f"{program.name}: {count_text(total)} parameters"
    return f"{words}, {count_text(active)} active per token" if active < total else words


def sample_words(plan: Plan, program: Program | None) -> str:
    """One training sample: its tokens, images and audio."""
    load = plan.workload
    words = [f"{load.seq_len:,} tokens"]
    images = load.images if program is None else program.sample.images
    if images:
        each = f" of {load.image_size[0]}x{load.image_size[1]}"
        if program is not None and program.sample.patches_per_image:
            each = f" ({program.sample.patches_per_image:,} patches each)"
        words.append(plural(images, "image") + each)
    if program is None and load.audio_seconds:
        words.append(f"{load.audio_seconds:g} s of audio")
    if program is not None and program.sample.clips:
        words.append(plural(program.sample.clips, "audio clip") + f" ({program.sample.frames_per_clip:,} frames each)")
    return ", ".join(words)


def step_words(plan: Plan) -> str:
    """Samples and tokens of an optimizer step, and how they come together."""
    samples = plan.global_batch
    steps, ranks = plural(plan.accumulation, "micro-step"), plural(plan.mesh.data_ranks, "data rank")
    factors = f"{plan.micro_batch} per micro-batch x {steps} x {ranks}"
    return f"{plural(samples, 'sample')}, {count_text(samples * plan.workload.seq_len)} tokens ({factors})"


def option_words(plan: Plan) -> str:
    """Choices that concern the whole step."""
    words = [
        f"{plan.param_dtype} compute",
        f"{plan.reduce_dtype} gradient reduction",
        f"{plan.loss_head.value} loss head",
    ]
    words += ["optimizer offloaded"] if plan.offload_optimizer else []
    return ", ".join([*words, *overlap_words(plan.overlap), *stack_words(plan.stack)])


def overlap_words(overlap: Overlap) -> list[str]:
    """What differs from the plainest way to run communication beside compute."""
    words = [] if overlap.exchanges else ["exchanges waited for at once"]
    words += forward_words(overlap)
    words += [f"parameters gathered {overlap.prefetch} units ahead"] if overlap.prefetch > 1 else []
    return words + (["replica sums in the backward"] if overlap.replica_sums else [])


def forward_words(overlap: Overlap) -> list[str]:
    """Of these, what changes which operators run, and not only their order."""
    words = [f"attention in {overlap.head_groups} groups of heads"] if overlap.head_groups > 1 else []
    return words + ([f"experts in {overlap.expert_chunks} chunks"] if overlap.expert_chunks > 1 else [])


def stack_words(stack: Stack) -> list[str]:
    """What differs from the stack that `parallelize` runs."""
    values = {f.name: (getattr(stack, f.name), f.default) for f in fields(stack)}
    return [f"{name} {value}" for name, (value, default) in values.items() if value != default]


def sharding_words(block: BlockPlan) -> str:
    """fsdp, or "fsdp, kept" where gathered parameters stay whole from the forward to the backward."""
    return block.sharding.value + ("" if block.reshard or block.sharding is Sharding.REPLICATE else ", kept")


def recompute_words(block: BlockPlan) -> str:
    """selective, or "selective, offload" where what is saved waits in host memory."""
    return block.recompute.value + (", offload" if block.offload else "")


def slower_words(plan: Plan, best: Plan) -> str:
    """-1.5%: the throughput of `plan` against that of `best`."""
    if plan.prediction is None or best.prediction is None or not best.prediction.tokens_per_second_per_gpu:
        return ""
    ratio = plan.prediction.tokens_per_second_per_gpu / best.prediction.tokens_per_second_per_gpu
    change = f"{(ratio - 1) * 100:+.1f}%"
    return "0.0%" if change in ("+0.0%", "-0.0%") else change


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
    if plan.overlap != best.overlap:
        words.append(", ".join(overlap_words(plan.overlap)) or "overlap as by default")
    if plan.stack != best.stack:
        words.append("stack: " + (", ".join(stack_words(plan.stack)) or "as executed"))
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
