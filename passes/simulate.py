"""Runs a lowered forward on all its ranks in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, fx

from omnicompile.passes.dropout_op import site_keys
from omnicompile.passes.rank_program import BATCH_AXES, RankProgram, axis_coordinate, group_ranks
from omnicompile.torch_compat import local_ranks_mode, on_each_rank, ranked, start_fake_group

# The whole value of a placeholder as the group of ranks with this data index sees it.
WholeValue = Callable[[str, int], Tensor]
SIMULATED_SEED = 12345  # of dropout

_UNINITIALISED = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.empty_like.default,
)


class Recorder(fx.Interpreter):
    """Runs a graph and keeps what every node gave, and after a backward the gradients that came back to it."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.seen: dict[str, object] = {}
        self._ids: set[int] = set()
        self._own: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if n.target in _UNINITIALISED and isinstance(value, Tensor):
            value.zero_()  # so that runs can be compared
        self.seen[n.name] = value
        if isinstance(value, Tensor):
            self._keep_gradient(n, value)
        return value

    def _keep_gradient(self, n: fx.Node, value: Tensor) -> None:
        """Of the first node that gave this tensor: one that hands it on would show the gradient of all its uses."""
        if id(value) not in self._ids and value.requires_grad and n.op == "call_function":
            value.retain_grad()
            self._own[n.name] = value
        self._ids.add(id(value))

    def gradients(self) -> dict[str, Tensor]:
        """By node, after the backward: the gradient of the loss by what the node gave."""
        grads = {name: value.grad for name, value in self._own.items()}
        return {n: torch.zeros_like(self._own[n]) if grad is None else grad.detach() for n, grad in grads.items()}


def bound_to_fake_groups(program: RankProgram) -> RankProgram:
    """A copy whose collectives run between simulated ranks."""
    start_fake_group(program.mesh.world)
    bound = program.copy()
    names = {}
    for axes in sorted(program.groups):
        names[axes] = dist.new_group(list(group_ranks(program.mesh, axes, 0))).group_name
    bound.bind(names)
    return bound


def rank_values(program: RankProgram, whole: WholeValue, one_batch: bool = False) -> dict[str, Tensor]:
    """What every placeholder holds on every rank. Call under `local_ranks_mode`.

    one_batch: all data ranks hold the same micro-batch, and drop the same elements of it.
    """
    mesh = program.mesh
    values: dict[str, Tensor] = {}
    for name, spec in program.params.items():
        full = whole(name, 0).detach()
        values[name] = ranked([spec.local_of(full, mesh, r) for r in range(mesh.world)])
        values[name].requires_grad_(spec.trainable)
    for name, item in program.inputs.items():
        if item.kind == "rank":
            same = one_batch and item.name == BATCH_AXES
            pieces = [torch.tensor(0 if same else axis_coordinate(mesh, item.name, r)) for r in range(mesh.world)]
        elif item.kind == "order":
            pieces = [torch.arange(int(item.name)) for _ in range(mesh.world)]
        elif item.kind == "dropout":
            site = int(item.name)
            pieces = [site_keys(SIMULATED_SEED, site + 1)[-1] for _ in range(mesh.world)]
        else:
            pieces = [whole(name, r // mesh.sp).clone() for r in range(mesh.world)]
        values[name] = ranked(pieces)
    return values


def whole_gradient(program: RankProgram, name: str, grad: Tensor) -> Tensor:
    """The gradient of the whole parameter behind placeholder `name`, after the sums that are left to the runtime."""
    mesh, spec = program.mesh, program.params[name]
    parts = [g.clone() for g in on_each_rank(grad)]
    for axes in spec.reduce_axes:
        parts = [torch.stack([parts[o] for o in group_ranks(mesh, axes, r)]).sum(0) for r in range(mesh.world)]
    shapes = [spec.shape]
    for shard in spec.shards:
        shapes.append(replace(spec, shape=shapes[-1], shards=(shard,)).local_shape(mesh))
    for shard, shape in zip(reversed(spec.shards), reversed(shapes[:-1])):
        parts = [
            torch.cat([parts[o] for o in group_ranks(mesh, shard.axes, r)], shard.dim).narrow(
                shard.dim, 0, shape[shard.dim]
            )
            for r in range(mesh.world)
        ]
    return parts[0]


@dataclass(frozen=True)
class RankRun:
    """losses: of every rank. gradients: whole ones, by parameter name. values, cotangents: what every node gave on
    every rank, and the gradients of the loss by that (floating-point tensors only)."""

    losses: list[float]
    gradients: dict[str, Tensor]
    values: Mapping[str, list[Tensor]]
    cotangents: Mapping[str, list[Tensor]]


def run_recorded(program: RankProgram, whole: WholeValue, one_batch: bool = False) -> RankRun:
    """Forward and backward on all ranks. one_batch: see `rank_values`."""
    bound = bound_to_fake_groups(program)
    with local_ranks_mode(program.mesh.world):
        values = rank_values(bound, whole, one_batch)
        recorder = Recorder(bound.gm)
        order = [node.name for node in bound.gm.graph.find_nodes(op="placeholder")]
        result = recorder.run(*(values[name] for name in order))
        loss = result[0] if isinstance(result, tuple | list) else result
        loss.backward()
        losses = [float(value) for value in on_each_rank(loss.detach())]
        grads: dict[str, Tensor] = {}
        for name, spec in bound.params.items():
            grad = values[name].grad
            if grad is not None:
                grads[spec.name] = whole_gradient(bound, name, grad)
        held = {
            name: [piece.detach() for piece in on_each_rank(value)]
            for name, value in recorder.seen.items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        cotangents = {name: on_each_rank(value) for name, value in recorder.gradients().items()}
    return RankRun(losses, grads, held, cotangents)


def run_ranks(
    program: RankProgram, whole: WholeValue, one_batch: bool = False
) -> tuple[list[float], dict[str, Tensor], Mapping[str, list[Tensor]]]:
    """`run_recorded` as every rank's loss, whole gradients by parameter name, and what every node held."""
    run = run_recorded(program, whole, one_batch)
    return run.losses, run.gradients, run.values
