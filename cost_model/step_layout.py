"""How a plan spreads a block over ranks: which ranks form each group, and how work and parameters divide among them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from omnicompile.plan import BlockPlan, Layout, Mesh, Sharding


@dataclass(frozen=True)
class Group:
    """`size` ranks that communicate, `per_node` of them on each node that they touch."""

    size: int
    per_node: int

    @property
    def trivial(self) -> bool:
        return self.size <= 1


def make_group(size: int, stride: int, world: int, gpus_per_node: int) -> Group:
    """`size` ranks, `stride` apart. Groups that straddle nodes unevenly count as the smallest even share."""
    node = min(world, gpus_per_node)
    slots = node // stride if stride <= node and node % stride == 0 else 1
    per_node = size if size <= slots and slots % size == 0 else math.gcd(size, slots)
    return Group(size, max(1, per_node))


@dataclass(frozen=True)
class Groups:
    """The groups that one block communicates in.

    sequence: ranks that share a micro-batch. experts: ranks among which experts are dealt out. shard / expert_shard:
    ranks among which (the rest of) a parameter is sharded. replica / expert_replica: ranks with equal shards, whose
    gradients are summed by an all-reduce.
    """

    sequence: Group
    experts: Group
    shard: Group
    replica: Group
    expert_shard: Group
    expert_replica: Group

    @property
    def resident(self) -> bool:
        """Whole parameters (of this rank's experts) are on the rank all the time."""
        return self.shard.trivial and self.expert_shard.trivial


def block_groups(mesh: Mesh, plan: BlockPlan, gpus_per_node: int) -> Groups:
    """Groups of a block under `plan`; ranks are numbered with sp fastest, then dp_shard, then dp_replicate."""
    world, inner, ep = mesh.world, mesh.dp_shard * mesh.sp, plan.ep

    def group(size: int, stride: int) -> Group:
        return make_group(size, stride, world, gpus_per_node)

    shard = {Sharding.FSDP: world, Sharding.HSDP: inner, Sharding.REPLICATE: 1}[plan.sharding]
    replicas = world // shard
    # With whole parameters everywhere, the experts' owners are still `ep` apart.
    expert_shard = max(1, shard // ep)
    expert_replicas = world // (ep * expert_shard)
    return Groups(
        sequence=group(mesh.sp, 1),
        experts=group(ep, 1),
        shard=group(shard, 1),
        replica=group(replicas, shard),
        expert_shard=group(expert_shard, ep),
        expert_replica=group(expert_replicas, ep * expert_shard),
    )


@dataclass(frozen=True)
class Split:
    """By what a rank's share of one micro-batch is smaller: `tokens` for rows of activations, `heads` for attention
    heads (1 where attention sees its own rows only)."""

    tokens: float = 1.0
    heads: int = 1


def block_split(plan: BlockPlan, sp: int, units: float) -> Split:
    """The largest rank's share of a block's work. `units`: images or clips in the micro-batch; dealing out whole ones
    leaves the fullest rank with ceil(units / sp)."""
    if plan.layout is Layout.SEQUENCE:
        return Split(tokens=float(sp), heads=sp)
    if plan.layout is Layout.IMAGES and units > 0:
        return Split(tokens=units / math.ceil(units / sp))
    return Split()


@dataclass(frozen=True)
class Gradient:
    """What the backward of a segment must produce."""

    weight: bool
    input: bool

    @property
    def any(self) -> bool:
        return self.weight or self.input
