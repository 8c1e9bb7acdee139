"""How a plan spreads a block over ranks: which ranks form each group, and how work and parameters divide among them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from omnicompile.plan import OURS, BlockPlan, Layout, Mesh, Sharding, Stack
from omnicompile.program import Segment


@dataclass(frozen=True)
class Group:
    """`size` ranks that communicate, `per_node` of them on each node that they touch."""

    size: int
    per_node: int

    @property
    def trivial(self) -> bool:
        return self.size <= 1


SOLO = Group(1, 1)


def make_group(size: int, stride: int, world: int, gpus_per_node: int) -> Group:
    """`size` ranks, `stride` apart. Groups that straddle nodes unevenly count as the smallest even share."""
    node = min(world, gpus_per_node)
    slots = node // stride if stride <= node and node % stride == 0 else 1
    per_node = size if size <= slots and slots % size == 0 else math.gcd(size, slots)
    return Group(size, max(1, per_node))


@dataclass(frozen=True)
class Groups:
    """The groups that one block communicates in.

    sequence: ranks that share a micro-batch and exchange heads for tokens around attention (Ulysses). experts: ranks
    among which experts are dealt out; expert_tensor: ranks that share an expert. shard / expert_shard: ranks among
    which (the rest of) a parameter is sharded. replica / expert_replica: ranks with equal shards, whose gradients are
    summed; states / expert_states: those among which the optimizer's state is dealt out. tensor: ranks that share every
    matrix; context: ranks that share a micro-batch and pass keys and values around a ring; stages: neighbours of a
    pipeline.
    """

    sequence: Group
    experts: Group
    shard: Group
    replica: Group
    expert_shard: Group
    expert_replica: Group
    tensor: Group = SOLO
    context: Group = SOLO
    stages: Group = SOLO
    expert_tensor: Group = SOLO
    states: Group = SOLO
    expert_states: Group = SOLO

    @property
    def resident(self) -> bool:
        """Whole parameters (of this rank's experts) are on the rank all the time."""
        return self.shard.trivial and self.expert_shard.trivial

    @property
    def zero1(self) -> bool:
        """Only the optimizer's state is sharded."""
        return not (self.states.trivial and self.expert_states.trivial)


def block_groups(mesh: Mesh, plan: BlockPlan, gpus_per_node: int, stack: Stack = OURS) -> Groups:
    """Groups of a block under `plan`; ranks are numbered with tp fastest, then cp, sp, dp_shard, dp_replicate, pp."""
    stage = mesh.world // mesh.pp
    data, inner = stage // mesh.tp, mesh.dp_shard * mesh.sp * mesh.cp
    owners = plan.ep * stack.expert_tp

    def group(size: int, stride: int) -> Group:
        return make_group(size, stride, mesh.world, gpus_per_node)

    whole = (Sharding.REPLICATE, Sharding.ZERO1)
    shard = 1 if plan.sharding in whole else inner if plan.sharding is Sharding.HSDP else data
    # With whole parameters everywhere, the experts' owners are still `ep` apart.
    expert_shard = max(1, shard * mesh.tp // owners) if shard > 1 else 1
    expert_replicas = stage // (owners * expert_shard)
    zero1 = plan.sharding is Sharding.ZERO1
    expert_states = expert_replicas // mesh.dp_replicate if expert_replicas % mesh.dp_replicate == 0 else 1
    return Groups(
        sequence=group(mesh.sp, mesh.tp * mesh.cp),
        experts=group(plan.ep, stack.expert_tp),
        shard=group(shard, mesh.tp),
        replica=group(data // shard, shard * mesh.tp),
        expert_shard=group(expert_shard, owners),
        expert_replica=group(expert_replicas, owners * expert_shard),
        tensor=group(mesh.tp, 1),
        context=group(mesh.cp, mesh.tp),
        stages=group(mesh.pp, stage),
        expert_tensor=group(stack.expert_tp, 1),
        states=group(inner, mesh.tp) if zero1 else SOLO,
        expert_states=group(expert_states, owners) if zero1 else SOLO,
    )


@dataclass(frozen=True)
class Split:
    """By what a rank's share of one micro-batch is smaller: `tokens` for rows of activations, `heads` for attention
    heads (1 where attention sees its own rows only), `tensor` for the columns or rows of every matrix, and of the
    rows between them if `tensor_sequence`. `context`: ranks of a ring, a part of `tokens`."""

    tokens: float = 1.0
    heads: int = 1
    tensor: int = 1
    tensor_sequence: bool = True
    context: int = 1

    def rows(self, inner: bool) -> float:
        """By what rows times width of an activation are smaller: inside a split matrix product or outside."""
        return self.tokens * (self.tensor if inner or self.tensor_sequence else 1)


def block_split(plan: BlockPlan, mesh: Mesh, units: float, stack: Stack = OURS) -> Split:
    """The largest rank's share of a block's work. `units`: images or clips in the micro-batch; dealing out whole ones
    leaves the fullest rank with ceil(units / sp)."""
    sp, tokens, heads = mesh.sp, 1.0, 1
    if plan.layout is Layout.SEQUENCE:
        tokens, heads = float(sp), sp
    elif plan.layout is Layout.IMAGES and units > 0:
        tokens = units / math.ceil(units / sp)
    return Split(tokens * mesh.cp, heads, mesh.tp, stack.tp_sequence, mesh.cp)


@dataclass(frozen=True)
class Gradient:
    """What the backward of a segment must produce."""

    weight: bool
    input: bool

    @property
    def any(self) -> bool:
        return self.weight or self.input


def all_params(segment: Segment, trained: bool = False) -> tuple[int, int]:
    """(dense, expert) parameters that one instance reads, shared ones included. trained: only those that the model lets
    be trained."""
    params = [p for p in segment.params if p.trained or not trained]
    expert = sum(p.numel for p in params if p.expert)
    return sum(p.numel for p in params) - expert, expert


def local_params(segment: Segment, groups: Groups, trained: bool = False) -> tuple[float, float]:
    """(dense, expert) parameters of one instance, shared ones included, that one rank works with."""
    dense, expert = all_params(segment, trained)
    return dense / groups.tensor.size, expert / groups.experts.size / groups.expert_tensor.size


def owned_params(
    segments: Sequence[Segment], groups: Groups, instances: int | None = None, trained: bool = False
) -> tuple[float, float]:
    """(dense, expert) parameters of all instances (or of so many), each counted once, whose shards a rank holds.
    trained: only those that the model lets be trained."""
    dense = expert = 0.0
    for segment in segments:
        count = segment.count if instances is None else instances
        own = [p for p in segment.params if not p.tied_to and (p.trained or not trained)]
        experts = sum(p.numel for p in own if p.expert)
        expert += experts * count
        dense += (sum(p.numel for p in own) - experts) * count
    dense /= groups.tensor.size * groups.shard.size
    return dense, expert / (groups.experts.size * groups.expert_tensor.size * groups.expert_shard.size)
