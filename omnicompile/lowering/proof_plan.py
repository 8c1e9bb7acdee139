"""Which plan a proof runs: the user's reduced to few ranks, or one that uses every mechanism at once."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from omnicompile.capture.regions import modality_of_input
from omnicompile.cluster import Cluster
from omnicompile.errors import LoweringError, PlanError
from omnicompile.lowering.tiny import Batch
from omnicompile.plan import BlockPlan, Layout, Mesh, Plan, Sharding
from omnicompile.workload import Workload


def reduced_plan(plan: Plan, gpus: int, experts: int) -> Plan:
    """`plan` on `gpus` GPUs with a mesh of the same shape: degrees that are 1 stay 1, others stay above 1 if they can.
    Experts are cut into as many chunks as the tiny copy's allow.

    experts: of the tiny copy, 0 for a model without. Raises LoweringError if the mesh has no such divisor.
    """
    old = plan.mesh
    options = [
        Mesh(dp_replicate=r, dp_shard=d, sp=s)
        for r, d, s in itertools.product(*(_divisors(n) for n in (old.dp_replicate, old.dp_shard, old.sp)))
        if r * d * s == gpus
    ]
    if not options:
        raise LoweringError(
            f"the plan's mesh {old.dp_replicate} x {old.dp_shard} x {old.sp} cannot be reduced to {gpus} GPUs: "
            "give --gpus a number that divides the plan's"
        )

    def kept(mesh: Mesh) -> tuple[int, int, int]:
        degrees = [(mesh.dp_replicate, old.dp_replicate), (mesh.dp_shard, old.dp_shard), (mesh.sp, old.sp)]
        return sum(new > 1 for new, _ in degrees), -max(new for new, _ in degrees), mesh.sp

    mesh = max(options, key=kept)
    mesh = replace(mesh, ep=largest_ep(mesh, old.ep, experts))
    blocks = {name: _on_mesh(b, mesh) for name, b in plan.blocks.items()}
    cluster = replace(plan.cluster, gpus=gpus)
    overlap = replace(plan.overlap, expert_chunks=_most_chunks(plan.overlap.expert_chunks, experts, mesh.ep))
    return replace(plan, mesh=mesh, blocks=blocks, cluster=cluster, micro_batch=1, accumulation=1, overlap=overlap)


def _most_chunks(wanted: int, experts: int, ep: int) -> int:
    """The largest number of chunks, at most `wanted`, that the experts of a rank are cut into."""
    mine = experts // ep if ep > 1 else 1
    return max(n for n in range(1, wanted + 1) if mine % n == 0)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _on_mesh(block: BlockPlan, mesh: Mesh) -> BlockPlan:
    """The block's choices with the degrees of `mesh`."""
    layout = Layout.BATCH if mesh.sp == 1 else block.layout
    return replace(block, layout=layout, sp=mesh.sp if block.sp > 1 else 1, ep=mesh.ep if block.ep > 1 else 1)


def largest_ep(mesh: Mesh, wanted: int, experts: int) -> int:
    """The largest ep, at most `wanted`, that the mesh and the number of experts allow; not all ranks if it can."""
    inner = mesh.dp_shard * mesh.sp
    fits = [n for n in range(1, min(wanted, inner) + 1) if inner % n == 0 and experts and experts % n == 0]
    folded = [n for n in fits if 1 < n < inner]
    return max(folded or fits, default=1)


def default_plan(model: nn.Module, batch: Batch, gpus: int) -> Plan:
    """A plan that uses every mechanism at once, as far as `gpus` GPUs go: HSDP, sequence and expert parallelism."""
    sp = 2 if gpus % 2 == 0 else 1
    shard = 2 if gpus % 4 == 0 else gpus // sp
    mesh = Mesh(dp_replicate=gpus // (sp * shard), dp_shard=shard, sp=sp)
    mesh = replace(mesh, ep=largest_ep(mesh, gpus, count_experts(model)))
    layout = Layout.SEQUENCE if sp > 1 else Layout.BATCH
    sharding = Sharding.HSDP if mesh.dp_replicate > 1 else Sharding.FSDP
    block = BlockPlan(sharding=sharding, layout=layout, sp=sp, ep=mesh.ep)
    blocks = {name: block if name == "text" else replace(block, ep=1) for name in block_names(batch)}
    return Plan("", Cluster(gpus=gpus), Workload(), mesh, blocks)


def block_names(batch: Batch) -> tuple[str, ...]:
    """Of the blocks that a model has: text, images, audio, and any other modality whose values it is given."""
    found = {name: modality_of_input(name) for name, value in batch.items() if isinstance(value, Tensor)}
    named = {m for name, m in found.items() if m in ("vision", "audio") or name.endswith("_values")}
    return ("text", *sorted(named - {"text", "video"}))


def count_experts(model: nn.Module) -> int:
    """Experts in a layer: the first dimension of three-dimensional weights that lie in a module of experts."""
    counts = {p.shape[0] for name, p in model.named_parameters() if p.dim() == 3 and "expert" in name}
    return counts.pop() if len(counts) == 1 else 0


def with_choices(
    plan: Plan,
    mesh: Mapping[str, int],
    blocks: Mapping[str, Mapping[str, Any]],
    experts: int,
    overlap: Mapping[str, Any] | None = None,
) -> Plan:
    """`plan` with some degrees of its mesh, some fields of its blocks and some ways of overlapping chosen; dp_shard
    makes up what is not chosen, and ep leaves each rank as many experts as chunks are asked for.

    Raises PlanError where the degrees do not make up the number of GPUs, or nothing is there to be overlapped so.
    """
    plan = replace(plan, overlap=replace(plan.overlap, **(overlap or {})))
    chunks = plan.overlap.expert_chunks
    new = _degrees(mesh, plan.cluster.gpus) if mesh else plan.mesh
    ep = largest_ep(new, plan.mesh.ep, experts if experts % chunks else experts // chunks)
    plan = replace(plan, mesh=replace(new, ep=mesh.get("ep", ep)))
    if overlap:
        _check_overlap(plan, experts, overlap)
    settled = {}
    for name, block in plan.blocks.items():
        cut = Layout.SEQUENCE if block.layout is Layout.BATCH else block.layout
        whole = replace(block, layout=cut, sp=2, ep=2 if block.ep > 1 or name == "text" else 1)
        settled[name] = replace(_on_mesh(whole, plan.mesh), **blocks.get(name, {}))
    return replace(plan, blocks=settled)


def _degrees(chosen: Mapping[str, int], gpus: int) -> Mesh:
    """Without ep."""
    degrees = {"dp_replicate": 1, "dp_shard": 1, "sp": 1} | {k: v for k, v in chosen.items() if k != "ep"}
    free = [name for name in ("dp_shard", "dp_replicate", "sp") if name not in chosen]
    product = degrees["dp_replicate"] * degrees["dp_shard"] * degrees["sp"]
    if gpus % product or (product != gpus and not free):
        raise PlanError(f"the mesh {degrees} does not make up {gpus} GPUs: change --gpus or the pinned degrees")
    if product != gpus:
        degrees[free[0]] = gpus // product
    return Mesh(**degrees)


def _check_overlap(plan: Plan, experts: int, chosen: Mapping[str, Any]) -> None:
    groups, chunks, mesh = chosen.get("head_groups", 1), chosen.get("expert_chunks", 1), plan.mesh
    if groups > 1 and mesh.sp == 1:
        raise PlanError(f"overlap.head_groups={groups}: heads are not exchanged (sp=1): pin mesh.sp")
    if chunks > 1 and mesh.ep == 1:
        raise PlanError(f"overlap.expert_chunks={chunks}: rows of experts are not exchanged (ep=1)")
    if experts // mesh.ep % chunks:
        raise PlanError(
            f"overlap.expert_chunks={chunks}: does not divide the {experts // mesh.ep} experts of a rank "
            f"(the tiny copy has {experts}, ep={mesh.ep})"
        )
