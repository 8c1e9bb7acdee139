"""Costs of whole blocks under a plan, remembered: the planner asks for the same few thousand times over."""

from __future__ import annotations

from dataclasses import dataclass

from omnicompile.cluster import Cluster
from omnicompile.cost_model.hardware import Hardware, load_hardware
from omnicompile.cost_model.memory import StaticMemory, static_memory
from omnicompile.cost_model.step_chain import Chain
from omnicompile.cost_model.step_layout import Gradient, Groups, Split, block_groups, block_split
from omnicompile.cost_model.step_numbers import ProgramNumbers
from omnicompile.cost_model.step_options import StepOptions
from omnicompile.cost_model.step_price import DTYPE_BYTES, Prices
from omnicompile.cost_model.step_units import (
    UnitCost,
    UnitWeights,
    UnitWork,
    edge_pieces,
    keeps_whole,
    op_seconds,
    packed_bytes,
    replica_sums,
    unit_weights,
    unit_work,
)
from omnicompile.plan import OURS, BlockPlan, Layout, LossHead, Mesh, Plan, Stack
from omnicompile.program import Program

OPTIMIZER_BYTES = 28
"""Traffic of one AdamW update of one float32 parameter: read weight, gradient and two moments, write all but the
gradient."""


@dataclass(frozen=True)
class BlockWork:
    """What a block's activations cost. units: by segment name. edge_forward / edge_backward: collectives where its
    output enters other blocks."""

    units: dict[str, UnitWork]
    edge_forward: Chain
    edge_backward: Chain


@dataclass(frozen=True)
class BlockWeights:
    """What a block's parameters cost. units: by segment name. replicas: sums of gradients over replicas, after the last
    micro-step. optimizer: kernel seconds of the update; optimizer_copy: host transfers of it, one way. static: bytes of
    parameters, gradients and optimizer state. accumulates: as in `StepOptions`. packed: bytes of the buffer in which
    gradients are summed over replicas."""

    units: dict[str, UnitWeights]
    replicas: Chain
    optimizer: float
    optimizer_copy: float
    static: StaticMemory
    accumulates: bool = True
    packed: float = 0.0

    @property
    def held(self) -> float:
        """Bytes that are there from the start of a step to its end."""
        return self.static.total - (0.0 if self.accumulates else self.static.gradients)


@dataclass(frozen=True)
class BlockCost:
    """A block under one plan."""

    work: BlockWork
    weights: BlockWeights
    units: dict[str, UnitCost]


def step_options(plan: Plan) -> StepOptions:
    return StepOptions(
        micro_batch=plan.micro_batch,
        loss_head=plan.loss_head,
        param_bytes=DTYPE_BYTES[plan.param_dtype],
        reduce_bytes=DTYPE_BYTES[plan.reduce_dtype],
        stack=plan.stack,
        pipelined=plan.mesh.pp > 1,
        accumulates=plan.accumulation > 1 or plan.mesh.pp > 1 or plan.stack != OURS,
        overlap=plan.overlap,
    )


class StepModel:
    """Prices blocks of one program on one cluster. Holds every number computed so far.

    whole: the model of the program that this one is a part of, such as a stage of a pipeline: it says what is trained
    upstream, and has its numbers.
    """

    def __init__(
        self, program: Program, cluster: Cluster, hardware: Hardware | None = None, whole: StepModel | None = None
    ) -> None:
        self.program = program
        self.cluster = cluster
        self.hardware = hardware or load_hardware(cluster.gpu)
        self.whole = whole
        self.numbers: ProgramNumbers = ProgramNumbers(program) if whole is None else whole.numbers
        self._prices: dict[Stack, Prices] = {} if whole is None else whole._prices
        self._work: dict[tuple[object, ...], BlockWork] = {}
        self._weights: dict[tuple[object, ...], BlockWeights] = {}
        self._weight_units: dict[tuple[object, ...], dict[str, UnitWeights]] = {}
        self._ops: dict[tuple[object, ...], tuple[float, ...]] = {} if whole is None else whole._ops
        self._gradients: dict[frozenset[str], dict[str, Gradient]] = {}
        self._group_cache: dict[tuple[object, ...], Groups] = {}
        self._heads = frozenset(s.block for s in program.segments if s.logits is not None)
        self._segments = {b.name: program.block_segments(b.name) for b in program.blocks}
        self.parts: dict[object, StepModel] = {}

    def prices(self, stack: Stack) -> Prices:
        if stack not in self._prices:
            self._prices[stack] = Prices(self.hardware, stack)
        return self._prices[stack]

    def gradients(self, frozen: frozenset[str]) -> dict[str, Gradient]:
        """By segment name, what its backward must produce when the blocks `frozen` are not trained."""
        if self.whole is not None:
            return self.whole.gradients(frozen)
        if frozen not in self._gradients:
            self._gradients[frozen] = segment_gradients(self.program, frozen)
        return self._gradients[frozen]

    def block(
        self,
        name: str,
        plan: BlockPlan,
        mesh: Mesh,
        options: StepOptions,
        offload_optimizer: bool,
        frozen: frozenset[str],
    ) -> BlockCost:
        """The cost of block `name`; `frozen`: all blocks that are not trained."""
        work = self.work(name, plan, mesh, options, frozen)
        weights = self.weights(name, plan, mesh, options, offload_optimizer, frozen)
        gradients = self.gradients(frozen)
        units = {
            segment: UnitCost(segment, name, gradients[segment].any, unit, weights.units[segment])
            for segment, unit in work.units.items()
        }
        return BlockCost(work, weights, units)

    def work(self, name: str, plan: BlockPlan, mesh: Mesh, options: StepOptions, frozen: frozenset[str]) -> BlockWork:
        """What the block's activations cost."""
        loss_head = options.loss_head if name in self._heads else LossHead.FULL
        groups = self._groups(mesh, plan, options.stack)
        key = (
            name, plan.layout, plan.recompute, plan.offload, groups.sequence, groups.experts, groups.tensor,
            groups.context, groups.expert_tensor, options.micro_batch, loss_head, frozen, options.param_bytes,
            options.stack, options.overlap,
        )  # fmt: skip
        if key not in self._work:
            self._work[key] = self._block_work(name, plan, mesh, groups, options, frozen)
        return self._work[key]

    def weights(
        self,
        name: str,
        plan: BlockPlan,
        mesh: Mesh,
        options: StepOptions,
        offload_optimizer: bool,
        frozen: frozenset[str],
    ) -> BlockWeights:
        """What the block's parameters cost."""
        groups = self._groups(mesh, plan, options.stack)
        key = (
            name, plan.reshard, groups.experts, groups.shard, groups.replica, groups.expert_shard,
            groups.expert_replica, groups.tensor, groups.states, options.param_bytes, options.reduce_bytes,
            offload_optimizer, frozen, options.stack, options.pipelined, options.accumulates, options.sums_inside,
        )  # fmt: skip
        if key not in self._weights:
            self._weights[key] = self._block_weights(name, plan, groups, options, offload_optimizer, frozen)
        return self._weights[key]

    def _groups(self, mesh: Mesh, plan: BlockPlan, stack: Stack) -> Groups:
        key = (mesh, plan.sharding, plan.ep, stack.expert_tp)
        if key not in self._group_cache:
            self._group_cache[key] = block_groups(mesh, plan, self.cluster.gpus_per_node, stack)
        return self._group_cache[key]

    def plan_blocks(self, plan: Plan) -> dict[str, BlockCost]:
        """Costs of all blocks under `plan`."""
        frozen = frozenset(name for name, block in plan.blocks.items() if block.frozen)
        options = step_options(plan)
        return {
            name: self.block(name, block, plan.mesh, options, plan.offload_optimizer, frozen)
            for name, block in plan.blocks.items()
        }

    def _block_work(
        self,
        name: str,
        plan: BlockPlan,
        mesh: Mesh,
        groups: Groups,
        options: StepOptions,
        frozen: frozenset[str],
    ) -> BlockWork:
        gradients = self.gradients(frozen)
        numbers = self.numbers.at(options.micro_batch)
        split = block_split(plan, mesh, numbers.units[name], options.stack)
        prices = self.prices(options.stack)
        units = {}
        for segment in self._segments[name]:
            chunked = segment.logits is not None and options.loss_head is LossHead.CHUNKED
            seconds = self._op_seconds(segment.name, options, split, plan.ep, chunked)
            own, gradient = numbers.segments[segment.name], gradients[segment.name]
            units[segment.name] = unit_work(own, plan, gradient, split, groups, options, prices, seconds)
        forward, backward = self._edges(name, plan, groups, options, gradients)
        return BlockWork(units, forward, backward)

    def _block_weights(
        self,
        name: str,
        plan: BlockPlan,
        groups: Groups,
        options: StepOptions,
        offload_optimizer: bool,
        frozen: frozenset[str],
    ) -> BlockWeights:
        segments = self._segments[name]
        units = self._unit_weights(name, plan, groups, options, frozen)
        whole = keeps_whole(plan, options)
        static = static_memory(segments, groups, options, name not in frozen, offload_optimizer, whole)
        if not static.trained_numel:
            return BlockWeights(units, (), 0.0, 0.0, static, options.accumulates)
        prices = self.prices(options.stack)
        replicas = replica_sums(segments, groups, options, prices)
        update = prices.memory(static.trained_numel * OPTIMIZER_BYTES)
        kept = (static, options.accumulates, packed_bytes(segments, groups, options))
        if not offload_optimizer:
            return BlockWeights(units, replicas, update, 0.0, *kept)
        copy = prices.host_copy(static.trained_numel * options.reduce_bytes)
        return BlockWeights(units, replicas, 0.0, max(update, copy), *kept)

    def _unit_weights(
        self, name: str, plan: BlockPlan, groups: Groups, options: StepOptions, frozen: frozenset[str]
    ) -> dict[str, UnitWeights]:
        """By segment; the same object for equal arguments, wherever the optimizer is."""
        key = (
            name,
            plan.reshard,
            groups,
            options.param_bytes,
            options.reduce_bytes,
            options.stack,
            options.pipelined,
            options.sums_inside,
            frozen,
        )
        if key not in self._weight_units:
            gradients = self.gradients(frozen)
            self._weight_units[key] = {
                s.name: unit_weights(s, plan, gradients[s.name], groups, options, self.prices(options.stack))
                for s in self._segments[name]
            }
        return self._weight_units[key]

    def _op_seconds(
        self, segment: str, options: StepOptions, split: Split, ep: int, chunked: bool
    ) -> tuple[float, ...]:
        key = (segment, options.micro_batch, split, ep, chunked, options.stack)
        if key not in self._ops:
            numbers = self.numbers.at(options.micro_batch).segments[segment]
            self._ops[key] = op_seconds(numbers, split, ep, chunked, self.prices(options.stack))
        return self._ops[key]

    def _edges(
        self, name: str, plan: BlockPlan, groups: Groups, options: StepOptions, gradients: dict[str, Gradient]
    ) -> tuple[Chain, Chain]:
        spread = plan.layout in (Layout.SEQUENCE, Layout.IMAGES)
        if not spread or self.program.block(name).kind != "encoder":
            return (), ()
        sizes = self.numbers.at(options.micro_batch).edges
        nbytes = sum(size for edge, size in zip(self.program.edges, sizes) if edge.source == name)
        needed = any(gradients[s.name].any for s in self._segments[name])
        prices = self.prices(options.stack)
        forward = edge_pieces(nbytes, groups, backward=False, prices=prices)
        return forward, edge_pieces(nbytes, groups, backward=True, prices=prices) if needed else ()


def segment_gradients(program: Program, frozen: frozenset[str]) -> dict[str, Gradient]:
    """What each segment's backward must produce.

    A weight gradient if its block is trained and it has parameters that the model lets be trained. An input gradient if
    something trained lies upstream: an earlier segment of the block, or (an embedding reads no activations) a block
    that feeds this one.
    """
    upstream = _trained_upstream(program, frozen)
    order = list(dict.fromkeys(run.segment for run in program.runs))
    order += [s.name for s in program.segments if s.name not in order]
    result: dict[str, Gradient] = {}
    started: set[str] = set()
    for name in order:
        segment = program.segment(name)
        weight = segment.block not in frozen and segment.trains
        flows = segment.block in started or (segment.block in upstream and segment.role != "embed")
        result[name] = Gradient(weight=weight, input=flows)
        if weight:
            started.add(segment.block)
    return result


def _trained_upstream(program: Program, frozen: frozenset[str]) -> set[str]:
    """Blocks that receive activations from anything trained."""
    trains = {s.block for s in program.segments if s.trains and s.block not in frozen}
    reached: set[str] = set()
    pending = [b.name for b in program.blocks if b.name in trains]
    while pending:
        source = pending.pop()
        for edge in program.edges:
            if edge.source == source and edge.target not in reached:
                reached.add(edge.target)
                pending.append(edge.target)
    return reached
