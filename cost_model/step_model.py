"""Costs of whole blocks under a plan, remembered: the planner asks for the same few thousand times over."""

from __future__ import annotations

from dataclasses import dataclass

from omnicompile.cluster import Cluster
from omnicompile.cost_model.hardware import Hardware, load_hardware
from omnicompile.cost_model.memory import StaticMemory, static_memory
from omnicompile.cost_model.step_chain import Chain
from omnicompile.cost_model.step_layout import Gradient, Groups, Split, block_groups, block_split
from omnicompile.cost_model.step_numbers import ProgramNumbers
from omnicompile.cost_model.step_price import DTYPE_BYTES, Prices
from omnicompile.cost_model.step_units import StepOptions, UnitCost, edge_pieces, op_seconds, unit_cost
from omnicompile.plan import BlockPlan, Layout, LossHead, Mesh, Plan
from omnicompile.program import Program

OPTIMIZER_BYTES = 28
"""Traffic of one AdamW update of one float32 parameter: read weight, gradient and two moments, write all but the
gradient."""


@dataclass(frozen=True)
class BlockCost:
    """A block under one plan. units: by segment name. edge_forward / edge_backward: collectives where its output
    enters other blocks. optimizer: kernel seconds of the update; optimizer_copy: host transfers of it, one way."""

    units: dict[str, UnitCost]
    edge_forward: Chain
    edge_backward: Chain
    optimizer: float
    optimizer_copy: float
    static: StaticMemory


@dataclass(frozen=True)
class BlockKey:
    """All that a block's cost depends on."""

    block: str
    plan: BlockPlan
    groups: Groups
    options: StepOptions
    offload_optimizer: bool
    frozen: frozenset[str]


def step_options(plan: Plan) -> StepOptions:
    return StepOptions(
        micro_batch=plan.micro_batch,
        loss_head=plan.loss_head,
        param_bytes=DTYPE_BYTES[plan.param_dtype],
        reduce_bytes=DTYPE_BYTES[plan.reduce_dtype],
    )


class StepModel:
    """Prices blocks of one program on one cluster. Holds every number computed so far."""

    def __init__(self, program: Program, cluster: Cluster, hardware: Hardware | None = None) -> None:
        self.program = program
        self.cluster = cluster
        self.hardware = hardware or load_hardware(cluster.gpu)
        self.numbers = ProgramNumbers(program)
        self.prices = Prices(self.hardware)
        self._blocks: dict[BlockKey, BlockCost] = {}
        self._ops: dict[tuple[str, int, Split, int, bool], tuple[float, ...]] = {}
        self._gradients: dict[frozenset[str], dict[str, Gradient]] = {}
        self._heads = frozenset(s.block for s in program.segments if s.logits is not None)
        self._segments = {b.name: program.block_segments(b.name) for b in program.blocks}

    def gradients(self, frozen: frozenset[str]) -> dict[str, Gradient]:
        """By segment name, what its backward must produce when the blocks `frozen` are not trained."""
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
        if name not in self._heads and options.loss_head is not LossHead.FULL:
            options = StepOptions(options.micro_batch, LossHead.FULL, options.param_bytes, options.reduce_bytes)
        groups = block_groups(mesh, plan, self.cluster.gpus_per_node)
        key = BlockKey(name, plan, groups, options, offload_optimizer, frozen)
        if key not in self._blocks:
            self._blocks[key] = self._block(key)
        return self._blocks[key]

    def plan_blocks(self, plan: Plan) -> dict[str, BlockCost]:
        """Costs of all blocks under `plan`."""
        frozen = frozenset(name for name, block in plan.blocks.items() if block.frozen)
        options = step_options(plan)
        return {
            name: self.block(name, block, plan.mesh, options, plan.offload_optimizer, frozen)
            for name, block in plan.blocks.items()
        }

    def _block(self, key: BlockKey) -> BlockCost:
        segments = self._segments[key.block]
        gradients = self.gradients(key.frozen)
        numbers = self.numbers.at(key.options.micro_batch)
        sp = key.groups.sequence.size
        split = block_split(key.plan, sp, numbers.units[key.block])
        units = {}
        for segment in segments:
            chunked = segment.logits is not None and key.options.loss_head is LossHead.CHUNKED
            seconds = self._op_seconds(segment.name, key.options.micro_batch, split, key.plan.ep, chunked)
            units[segment.name] = unit_cost(
                numbers.segments[segment.name],
                key.plan,
                gradients[segment.name],
                split,
                key.groups,
                key.options,
                self.prices,
                seconds,
            )
        trained = not key.plan.frozen
        static = static_memory(segments, key.groups, key.options, trained, key.offload_optimizer, key.plan.sharding)
        kernel, copy = self._optimizer(static, key)
        forward, backward = self._edges(key, gradients)
        return BlockCost(units, forward, backward, kernel, copy, static)

    def _op_seconds(self, segment: str, micro_batch: int, split: Split, ep: int, chunked: bool) -> tuple[float, ...]:
        key = (segment, micro_batch, split, ep, chunked)
        if key not in self._ops:
            numbers = self.numbers.at(micro_batch).segments[segment]
            self._ops[key] = op_seconds(numbers, split, ep, chunked, self.prices)
        return self._ops[key]

    def _optimizer(self, static: StaticMemory, key: BlockKey) -> tuple[float, float]:
        """Seconds of the update (kernels on the GPU, transfers one way when the optimizer state is in host memory)."""
        if not static.trained_numel:
            return 0.0, 0.0
        update = self.prices.memory(static.trained_numel * OPTIMIZER_BYTES)
        if key.offload_optimizer:
            return 0.0, max(update, self.prices.host_copy(static.trained_numel * key.options.reduce_bytes))
        return update, 0.0

    def _edges(self, key: BlockKey, gradients: dict[str, Gradient]) -> tuple[Chain, Chain]:
        spread = key.plan.layout in (Layout.SEQUENCE, Layout.IMAGES)
        if not spread or self.program.block(key.block).kind != "encoder":
            return (), ()
        sizes = self.numbers.at(key.options.micro_batch).edges
        nbytes = sum(size for edge, size in zip(self.program.edges, sizes) if edge.source == key.block)
        needed = any(gradients[s.name].any for s in self._segments[key.block])
        forward = edge_pieces(nbytes, key.groups, backward=False, prices=self.prices)
        return forward, edge_pieces(nbytes, key.groups, backward=True, prices=self.prices) if needed else ()


def segment_gradients(program: Program, frozen: frozenset[str]) -> dict[str, Gradient]:
    """What each segment's backward must produce.

    A weight gradient if its block is trained and it has parameters. An input gradient if something trained lies
    upstream: an earlier segment of the block, or (an embedding reads no activations) a block that feeds this one.
    """
    upstream = _trained_upstream(program, frozen)
    order = list(dict.fromkeys(run.segment for run in program.runs))
    order += [s.name for s in program.segments if s.name not in order]
    result: dict[str, Gradient] = {}
    started: set[str] = set()
    for name in order:
        segment = program.segment(name)
        weight = segment.block not in frozen and bool(segment.params)
        flows = segment.block in started or (segment.block in upstream and segment.role != "embed")
        result[name] = Gradient(weight=weight, input=flows)
        if weight:
            started.add(segment.block)
    return result


def _trained_upstream(program: Program, frozen: frozenset[str]) -> set[str]:
    """Blocks that receive activations from anything trained."""
    trains = {s.block for s in program.segments if s.params and s.block not in frozen}
    reached: set[str] = set()
    pending = [b.name for b in program.blocks if b.name in trains]
    while pending:
        source = pending.pop()
        for edge in program.edges:
            if edge.source == source and edge.target not in reached:
                reached.add(edge.target)
                pending.append(edge.target)
    return reached
