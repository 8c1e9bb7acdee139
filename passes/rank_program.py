"""What the passes work on: the forward graph of one rank, with what its placeholders mean.

Groups of ranks are named by axes strings, resolved late: "sp"; "dp_shard,sp"; "dp_replicate,dp_shard,sp";
"dp_replicate"; "ep" (consecutive ranks); "ep_rest" (the dp_shard * sp / ep ranks that hold the same experts);
"dp_replicate,ep_rest".
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from omnicompile.cluster import Cluster
from omnicompile.errors import InputError
from omnicompile.kernels.choice import KernelChoice
from omnicompile.passes.placement import Placement
from omnicompile.plan import BlockPlan, LossHead, Mesh, Overlap

GROUP_PREFIX = "axes:"  # of a group argument that is not bound yet
DATA_AXES = "dp_replicate,dp_shard,sp"
BATCH_AXES = "dp_replicate,dp_shard"  # ranks with micro-batches of their own


@dataclass(frozen=True)
class ShardSpec:
    """Stored as this rank's chunk, of ceil(size / ranks) along `dim`, zero-padded so that all ranks hold equal
    shapes."""

    axes: str
    dim: int


@dataclass(frozen=True)
class ParamSpec:
    """A parameter placeholder. `shape` is the whole parameter's. After lowering the placeholder takes the stored
    shard: `shards` are applied in order; the gradient must still be summed over each group in `reduce_axes` after the
    backward."""

    name: str
    shape: tuple[int, ...]
    trainable: bool = True
    dtype: torch.dtype = torch.float32
    shards: tuple[ShardSpec, ...] = ()
    reduce_axes: tuple[str, ...] = ()

    def local_shape(self, mesh: Mesh) -> tuple[int, ...]:
        shape = list(self.shape)
        for shard in self.shards:
            shape[shard.dim] = -(-shape[shard.dim] // axis_size(mesh, shard.axes))
        return tuple(shape)

    def local_of(self, full: torch.Tensor, mesh: Mesh, rank: int) -> torch.Tensor:
        """What `rank` stores of the whole parameter."""
        value = full
        for shard in self.shards:
            size = axis_size(mesh, shard.axes)
            chunk = -(-value.shape[shard.dim] // size)
            start = min(axis_coordinate(mesh, shard.axes, rank) * chunk, value.shape[shard.dim])
            part = value.narrow(shard.dim, start, min(chunk, value.shape[shard.dim] - start))
            padded = list(value.shape)
            padded[shard.dim] = chunk
            whole = value.new_zeros(padded)
            whole.narrow(shard.dim, 0, part.shape[shard.dim]).copy_(part)
            value = whole
        return value.clone()


@dataclass(frozen=True)
class InputSpec:
    """A placeholder that is no parameter.

    kind: "input" (a float tensor of the batch), "host" (metadata made on the host), "buffer" (of the model),
    "constant", "count" (number of target tokens over all ranks and micro-steps, 0-d float32), "rank" (this rank's
    coordinate in the group `name`, 0-d int64) or "dropout" (the key of dropout site number `name` in this forward, 0-d
    int64) or "order" (where rows of images come from, [int(name)] int64, see image_order.py). packed: takes the value
    for the images in the order that deals them out to ranks. token_dim: the dimension that runs along the tokens or
    patches of its block, where cutting starts. of_batch: of a number (0-d) made on the host of what is in the batch:
    "total" if it counts over all of that, else "number".
    """

    name: str
    kind: str
    token_dim: int | None = None
    packed: bool = False
    of_batch: str = ""


@dataclass
class RankProgram:
    """The forward graph of one rank. Before lowering: every placeholder whole, shapes of one SP group's micro-batch.

    blocks: by the names in node.meta["block"]. params / inputs: by placeholder name. param_dtype: compute dtype, None
    for the stored one. reduce_dtype: of the gradient reductions. groups: axes strings in use. outputs: placement of
    every output over sp; scalars are a data rank's summands, the first is the loss and Partial. aligned: placeholders
    of segment bounds that must include every multiple of the given size (see `check_alignment`). compute_weights: a
    step is given parameters in the compute dtype; masters stay with the optimizer on the host.
    """

    gm: fx.GraphModule
    mesh: Mesh
    blocks: dict[str, BlockPlan]
    params: dict[str, ParamSpec]
    inputs: dict[str, InputSpec]
    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    loss_head: LossHead = LossHead.FULL
    notes: list[str] = field(default_factory=list)
    groups: set[str] = field(default_factory=set)
    outputs: tuple[Placement, ...] = ()
    log: list[str] = field(default_factory=list)
    aligned: dict[str, int] = field(default_factory=dict)
    done: tuple[str, ...] = ()
    overlap: Overlap = field(default_factory=Overlap)
    cluster: Cluster | None = None  # what times are estimated for; None: the default GPUs
    bound: dict[str, str] = field(default_factory=dict)  # names of process groups by axes string
    kernels: KernelChoice | None = None  # None: operators stay as they are
    compute_weights: bool = False

    def group(self, axes: str) -> str:
        """The group argument of a collective over `axes`, to be bound late."""
        self.groups.add(axes)
        return GROUP_PREFIX + axes

    def output_nodes(self) -> tuple[fx.Node, ...]:
        (output,) = self.gm.graph.find_nodes(op="output")
        values = output.args[0]
        return tuple(values) if isinstance(values, tuple | list) else (values,)  # type: ignore[arg-type]

    def block_of(self, node: fx.Node) -> BlockPlan:
        name = node.meta.get("block")
        return self.blocks[name] if name in self.blocks else self.main_block()

    def main_block(self) -> BlockPlan:
        """The block of the loss."""
        name = self.output_nodes()[0].meta.get("block")
        return self.blocks[name] if name in self.blocks else next(iter(self.blocks.values()))

    def copy(self) -> RankProgram:
        """A program whose graph may be changed without changing this one's."""
        return replace(
            self, gm=copied(self.gm), params=dict(self.params), inputs=dict(self.inputs), notes=list(self.notes),
            groups=set(self.groups), log=list(self.log), aligned=dict(self.aligned), bound=dict(self.bound),
        )  # fmt: skip

    def bind(self, names: Mapping[str, str]) -> None:
        """Put the names of process groups in the place of axes strings, in place. names: by axes string."""
        bind_groups(self.gm, names)
        self.bound |= names


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph, with metadata of its own, on the same submodules."""
    graph = fx.Graph()
    memo: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, memo)
    graph.output(output)
    for old, new in memo.items():
        new.meta = copy.copy(old.meta)
    return fx.GraphModule(gm, graph)


def check_alignment(program: RankProgram, values: Mapping[str, torch.Tensor]) -> None:
    """Whether whole images fall on each rank in this batch (layout "images"). Raises InputError otherwise."""
    for name, size in program.aligned.items():
        bounds = set(values[name].tolist())
        missing = [edge for edge in range(0, max(bounds) + 1, size) if edge not in bounds]
        if missing:
            raise InputError(
                f"layout 'images' deals whole images out to {max(bounds) // size} ranks of {size} patches, but an "
                f"image lies across patch {missing[0]}: "
                "order or pad the images so that one ends there, or use layout 'sequence'"
            )


def _axis_names(axes: str) -> list[str]:
    return axes.split(",")


def _axis_sizes(mesh: Mesh) -> dict[str, int]:
    inner = mesh.dp_shard * mesh.sp
    return {
        "dp_replicate": mesh.dp_replicate,
        "dp_shard": mesh.dp_shard,
        "sp": mesh.sp,
        "ep": mesh.ep,
        "ep_rest": inner // mesh.ep,
    }


def _coordinates(mesh: Mesh, rank: int) -> dict[str, int]:
    inner = mesh.dp_shard * mesh.sp
    within = rank % inner
    return {
        "dp_replicate": rank // inner,
        "dp_shard": within // mesh.sp,
        "sp": within % mesh.sp,
        "ep": within % mesh.ep,
        "ep_rest": within // mesh.ep,
    }


def axis_size(mesh: Mesh, axes: str) -> int:
    sizes = _axis_sizes(mesh)
    return math.prod(sizes[name] for name in _axis_names(axes))


def axis_coordinate(mesh: Mesh, axes: str, rank: int) -> int:
    """The place of `rank` in its group over `axes`, the first axis named being the slowest."""
    sizes, coordinates = _axis_sizes(mesh), _coordinates(mesh, rank)
    place = 0
    for name in _axis_names(axes):
        place = place * sizes[name] + coordinates[name]
    return place


def group_ranks(mesh: Mesh, axes: str, rank: int) -> tuple[int, ...]:
    """The ranks of the group over `axes` that `rank` belongs to, by their place in it."""
    names = _axis_names(axes)
    folded = any(name.startswith("ep") for name in names)
    others = ["dp_replicate", "ep_rest", "ep"] if folded else ["dp_replicate", "dp_shard", "sp"]
    mine = _coordinates(mesh, rank)
    members = []
    for other in range(mesh.dp_replicate * mesh.dp_shard * mesh.sp):
        theirs = _coordinates(mesh, other)
        if all(theirs[name] == mine[name] for name in others if name not in names):
            members.append(other)
    return tuple(sorted(members, key=lambda r: axis_coordinate(mesh, axes, r)))


def bind_groups(gm: fx.GraphModule, names: Mapping[str, str]) -> fx.GraphModule:
    """Put real process group names in the place of axes strings, in place. Raises KeyError for a group without a
    name."""

    def bound(value: object) -> object:
        if isinstance(value, str) and value.startswith(GROUP_PREFIX):
            return names[value.removeprefix(GROUP_PREFIX)]
        return value

    for node in gm.graph.nodes:
        if node.op == "call_function" and any(isinstance(a, str) for a in [*node.args, *node.kwargs.values()]):
            node.args = tuple(bound(a) for a in node.args)
            node.kwargs = {k: bound(v) for k, v in node.kwargs.items()}
    gm.recompile()
    return gm
