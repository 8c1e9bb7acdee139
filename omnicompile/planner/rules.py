"""Which plans can be executed: divisibility and consistency, each refusal with its reason."""

from __future__ import annotations

from collections.abc import Iterator

from omnicompile.cluster import Cluster
from omnicompile.cost_model.step_overlap import head_groups_fit
from omnicompile.cost_model.step_price import DTYPE_BYTES
from omnicompile.errors import PlanError
from omnicompile.plan import BlockPlan, Layout, Mesh, Overlap, Plan, Sharding
from omnicompile.program import Block, Program


def sequence_refusal(program: Program, block: Block, sp: int) -> str | None:
    """Why the tokens of `block` cannot be split over `sp` ranks with an all-to-all around attention; None if they can.

    Heads are dealt out to ranks. With fewer key/value heads than ranks each of them is kept by sp / kv_heads ranks.
    """
    for segment in program.block_segments(block.name):
        for attention in segment.attention_ops():
            if attention.heads % sp:
                return f"{block.name} has {attention.heads} attention heads, which sp={sp} does not divide"
            kv = attention.kv_heads
            if kv % sp and sp % kv:
                return f"{block.name} has {kv} key/value heads, which sp={sp} neither divides nor is a multiple of"
    return None


def sp_refusal(program: Program, sp: int) -> str | None:
    """Why no mesh can have this `sp`: every block but an encoder is split along the sequence when sp > 1."""
    if sp == 1:
        return None
    for block in program.blocks:
        if block.kind != "encoder" and (reason := sequence_refusal(program, block, sp)):
            return reason
    return None


def expert_counts(program: Program) -> set[int]:
    """Numbers of experts that occur in the program's layers."""
    return {op.experts.experts for segment in program.segments for op in segment.ops if op.experts is not None} | {
        p.shape[0] for segment in program.segments for p in segment.params if p.expert
    }


def ep_refusal(program: Program, mesh: Mesh, expert_tp: int = 1) -> str | None:
    """Why experts cannot be dealt out to `mesh.ep` ranks (or groups of `expert_tp` ranks); None if they can."""
    if mesh.ep * expert_tp == 1:
        return None
    counts = expert_counts(program)
    if not counts:
        what = f"ep={mesh.ep}" if mesh.ep > 1 else f"expert_tp={expert_tp}"
        return f"{what}: the model has no experts"
    for count in sorted(counts):
        if count % mesh.ep:
            return f"the model has layers of {count} experts, which ep={mesh.ep} does not divide"
    if mesh.tp * mesh.cp * expert_tp > 1:
        stage = mesh.world // mesh.pp
        if stage % (mesh.ep * expert_tp):
            return f"ep={mesh.ep} x expert_tp={expert_tp} does not divide the {stage} ranks of a pipeline stage"
    elif (mesh.dp_shard * mesh.sp) % mesh.ep:
        return f"ep={mesh.ep} does not divide dp_shard x sp = {mesh.dp_shard * mesh.sp}"
    return None


def tp_refusal(program: Program, mesh: Mesh) -> str | None:
    """Why the matrices of the backbone cannot be split over `mesh.tp` ranks; None if they can."""
    for block in program.blocks:
        for segment in program.block_segments(block.name):
            for attention in segment.attention_ops():
                if block.kind != "encoder" and attention.heads % (mesh.tp * mesh.sp):
                    ranks = f"tp={mesh.tp}" if mesh.sp == 1 else f"tp={mesh.tp} x sp={mesh.sp}"
                    return f"{block.name} has {attention.heads} attention heads, which {ranks} does not divide"
    return None


def head_groups_refusal(program: Program, mesh: Mesh, groups: int) -> str | None:
    """Why no attention is exchanged in `groups` groups of heads; None if some is. The lowering leaves others whole."""
    if groups == 1:
        return None
    if mesh.sp == 1:
        return f"head_groups={groups}: heads are not exchanged (sp=1)"
    shapes = [shape for segment in program.segments for shape in segment.attention_ops()]
    if any(head_groups_fit(shape.heads, shape.kv_heads, mesh.sp, groups) for shape in shapes):
        return None
    return f"head_groups={groups}: with sp={mesh.sp} no rank's heads can be cut into {groups} equal groups"


def chunks_refusal(program: Program, mesh: Mesh, chunks: int) -> str | None:
    """Why the experts of a rank cannot be cut into `chunks` chunks; None if they can."""
    if chunks == 1:
        return None
    if mesh.ep == 1:
        return f"expert_chunks={chunks}: rows of experts are not exchanged (ep=1)"
    for count in sorted(expert_counts(program)):
        if count // mesh.ep % chunks:
            return f"expert_chunks={chunks}: does not divide the {count // mesh.ep} experts of a rank (ep={mesh.ep})"
    return None


def overlap_refusal(program: Program, mesh: Mesh, overlap: Overlap) -> str | None:
    """Why communication cannot run beside compute so; None if it can."""
    if not overlap.exchanges and max(overlap.head_groups, overlap.expert_chunks) > 1:
        return "head_groups and expert_chunks need exchanges=true"
    groups = head_groups_refusal(program, mesh, overlap.head_groups)
    return groups or chunks_refusal(program, mesh, overlap.expert_chunks)


def dtype_refusal(plan: Plan) -> str | None:
    """Why one of the plan's dtypes cannot be priced; None if all can."""
    stack = plan.stack
    named = {
        "param_dtype": plan.param_dtype,
        "reduce_dtype": plan.reduce_dtype,
        "master_dtype": stack.master_dtype,
        "moment_dtype": stack.moment_dtype,
    }
    for name, dtype in named.items():
        if dtype not in DTYPE_BYTES:
            return f"{name}={dtype}: must be one of {', '.join(DTYPE_BYTES)}"
    return None


def pipeline_refusal(program: Program, plan: Plan) -> str | None:
    """Why the layers cannot be dealt out to the stages of a pipeline; None if they can."""
    stages, chunks = plan.mesh.pp, plan.stack.pipeline_chunks
    if chunks > 1 and stages == 1:
        return f"pipeline_chunks={chunks} without a pipeline (pp=1)"
    layers = sum(run.count for run in program.runs if program.segment(run.segment).role == "layer")
    if stages > 1 and (layers < stages or layers + 2 < stages * chunks):
        of_chunks = f" of {chunks} chunks" if chunks > 1 else ""
        return f"{layers} layers cannot be dealt out to pp={stages} stages{of_chunks}"
    return None


def mesh_refusal(program: Program, cluster: Cluster, mesh: Mesh, expert_tp: int = 1) -> str | None:
    """Why the mesh cannot be used; None if it can."""
    if mesh.world != cluster.gpus:
        return f"the mesh has {mesh.world} ranks and the cluster {cluster.gpus} GPUs"
    return sp_refusal(program, mesh.sp) or ep_refusal(program, mesh, expert_tp) or tp_refusal(program, mesh)


def batch_refusal(plan: Plan) -> str | None:
    wanted = plan.workload.global_batch or plan.cluster.gpus
    if plan.global_batch != wanted:
        return (
            f"micro_batch {plan.micro_batch} x accumulation {plan.accumulation} x {plan.mesh.data_ranks} data ranks = "
            f"{plan.global_batch} samples, but an optimizer step has {wanted}"
        )
    return None


def has_experts(program: Program, block: str) -> bool:
    return any(s.expert_param_count for s in program.block_segments(block))


def block_refusal(program: Program, mesh: Mesh, name: str, plan: BlockPlan) -> str | None:
    """Why block `name` cannot be run as `plan` says; None if it can."""
    block = program.block(name)
    return (
        _layout_refusal(program, mesh, block, plan)
        or _sharding_refusal(mesh, name, plan)
        or _expert_refusal(program, mesh, name, plan)
    )


def _layout_refusal(program: Program, mesh: Mesh, block: Block, plan: BlockPlan) -> str | None:
    sp, name, layout = mesh.sp, block.name, plan.layout
    if (layout is Layout.BATCH) != (sp == 1):
        return f"{name}: layout {layout} with sp={sp} (sp = 1 goes with layout batch, and only that)"
    wanted = sp if layout in (Layout.SEQUENCE, Layout.IMAGES) else 1
    if plan.sp != wanted:
        return f"{name}: layout {layout} means sp={wanted}, not {plan.sp}"
    if layout in (Layout.REPLICATED, Layout.IMAGES) and block.kind != "encoder":
        return f"{name}: only encoders can be laid out as {layout}; a {block.kind} is split along the sequence"
    if layout is Layout.IMAGES and not block.units:
        return f"{name}: has no images or clips to deal out"
    return sequence_refusal(program, block, sp) if layout is Layout.SEQUENCE else None


def _sharding_refusal(mesh: Mesh, name: str, plan: BlockPlan) -> str | None:
    if plan.sharding is Sharding.HSDP:
        if mesh.dp_replicate == 1:
            return f"{name}: hsdp needs dp_replicate > 1 (with 1 it is fsdp)"
        if mesh.dp_shard * mesh.sp * mesh.cp == 1:
            return f"{name}: hsdp over dp_shard x sp = 1 rank shards nothing (that is replicate)"
    return None


def _expert_refusal(program: Program, mesh: Mesh, name: str, plan: BlockPlan) -> str | None:
    wanted = mesh.ep if has_experts(program, name) else 1
    if plan.ep != wanted:
        return f"{name}: ep={plan.ep}, but on this mesh it must be {wanted}"
    return None


def frozen_blocks(program: Program, freeze: tuple[str, ...]) -> frozenset[str]:
    """Blocks that the workload does not train, and those none of whose parameters the model itself lets be trained.
    Raises PlanError for a name that is no block."""
    frozen = {b.name for b in program.blocks if not _trains(program, b.name)}
    names = {b.name for b in program.blocks}
    for entry in freeze:
        if entry == "encoders":
            frozen |= {b.name for b in program.blocks if b.kind == "encoder"}
        elif entry in names:
            frozen.add(entry)
        else:
            raise PlanError(f'cannot freeze {entry!r}: blocks are {", ".join(sorted(names))} (or "encoders")')
    return frozenset(frozen)


def _trains(program: Program, block: str) -> bool:
    """Whether the model lets anything of a block be trained. A block without parameters counts as trained."""
    segments = [s for s in program.block_segments(block) if s.params]
    return not segments or any(s.trains for s in segments)


def plan_refusals(program: Program, plan: Plan) -> Iterator[str]:
    """Everything that is wrong with a plan."""
    names = {b.name for b in program.blocks}
    if set(plan.blocks) != names:
        yield f"the plan has blocks {', '.join(sorted(plan.blocks))}, the model {', '.join(sorted(names))}"
        return
    if min(plan.micro_batch, plan.accumulation) < 1:
        yield "micro_batch and accumulation must be at least 1"
        return
    for reason in (
        dtype_refusal(plan),
        mesh_refusal(program, plan.cluster, plan.mesh, plan.stack.expert_tp),
        pipeline_refusal(program, plan),
        batch_refusal(plan),
        overlap_refusal(program, plan.mesh, plan.overlap),
    ):
        if reason:
            yield reason
            return
    frozen = frozen_blocks(program, plan.workload.freeze)
    for name, block in plan.blocks.items():
        if reason := block_refusal(program, plan.mesh, name, block):
            yield reason
        if block.frozen != (name in frozen):
            why = "the workload says" if _trains(program, name) else "by the model's own requires_grad it is"
            yield f"{name}: frozen={block.frozen}, but {why} {name in frozen}"


def check_plan(program: Program, plan: Plan) -> None:
    """Raises PlanError, naming the first inconsistency."""
    for reason in plan_refusals(program, plan):
        raise PlanError(reason)
