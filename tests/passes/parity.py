"""Loss and every gradient of a lowered forward, on all ranks in one process, against the single-process model."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from omnicompile.lowering.graph_capture import CapturedForward, LoweredInputs, capture_forward
from omnicompile.passes import lower_forward
from omnicompile.passes.rank_program import (
    InputSpec,
    ParamSpec,
    RankProgram,
    axis_coordinate,
    bind_groups,
    group_ranks,
)
from omnicompile.plan import BlockPlan, Mesh
from omnicompile.torch_compat import local_ranks_mode, on_each_rank, ranked, start_fake_group

Batch = dict[str, Tensor]


@dataclass
class Parity:
    """loss_error: relative. errors: per parameter, as design 2.5 defines them. program: the lowered one."""

    loss_error: float
    errors: dict[str, float]
    program: RankProgram

    @property
    def worst(self) -> tuple[str, float]:
        return max(self.errors.items(), key=lambda item: item[1], default=("", 0.0))


def shifted_targets(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


def reference(model: nn.Module, batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the whole model on all batches, normalised by the targets of all."""
    total = sum(shifted_targets(b) for b in batches)
    model.zero_grad()
    value = 0.0
    for batch in batches:
        loss = model(**batch).loss * (shifted_targets(batch) / total)
        loss.backward()
        value += loss.item()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return value, grads


def reference_joined(model: nn.Module, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the whole model on one batch."""
    return reference(model, [batch])


def block_of(node: torch.fx.Node, encoders: tuple[str, ...]) -> str:
    """The block that a module path belongs to: an encoder if it contains its name, else "text"."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = " ".join(str(entry[0]) for entry in stack.values())
    return next((name for name in encoders if name in paths), "text")


def program_of(
    captured: CapturedForward, model: nn.Module, mesh: Mesh, blocks: dict[str, BlockPlan], tokens: int
) -> RankProgram:
    """The captured forward as input of the passes. Blocks other than "text" are found by their name in module paths."""
    encoders = tuple(name for name in blocks if name != "text")
    for node in captured.gm.graph.nodes:
        node.meta["block"] = block_of(node, encoders)
    values = {n.name: n.meta["val"] for n in captured.gm.graph.find_nodes(op="placeholder")}
    named = dict(model.named_parameters(remove_duplicate=False))
    first = {id(p): name for name, p in reversed(list(named.items()))}
    params = {
        p: ParamSpec(first[id(named[n])], tuple(named[n].shape), named[n].requires_grad, named[n].dtype)
        for p, n in captured.params.items()
    }
    inputs = {p: InputSpec(name, "buffer") for p, name in captured.buffers.items()}
    inputs |= {p: InputSpec(p, "constant") for p in captured.constants}
    inputs |= {p: InputSpec(name, "input", 0) for p, name in captured.inputs.items()}
    for name in captured.host:
        shape = values[name].shape
        inputs[name] = InputSpec(name, "host", len(shape) - 1 if shape and shape[-1] == tokens else None)
    return RankProgram(captured.gm, mesh, blocks, params, inputs)


def bind_fake_groups(program: RankProgram) -> None:
    """Groups of the fake process group in the place of axes strings."""
    names = {}
    for axes in sorted(program.groups):
        names[axes] = dist.new_group(list(group_ranks(program.mesh, axes, 0))).group_name
    bind_groups(program.gm, names)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def placeholder_values(
    program: RankProgram, captured: CapturedForward, prepared: list[dict[str, Tensor]], model: nn.Module, targets: float
) -> dict[str, Tensor]:
    """What each placeholder holds on every rank. `prepared`: inputs per data rank (per micro-batch)."""
    mesh, world = program.mesh, program.mesh.world
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    values: dict[str, Tensor] = {}
    for name, spec in program.params.items():
        full = named[spec.name].detach()
        values[name] = ranked([spec.local_of(full, mesh, r) for r in range(world)])
        values[name].requires_grad_(spec.trainable)
    for name, item in program.inputs.items():
        if item.kind == "buffer":
            whole = [named[item.name].clone()] * world
        elif item.kind == "constant":
            whole = [captured.constants[item.name].clone()] * world
        elif item.kind == "count":
            whole = [torch.tensor(float(targets))] * world
        elif item.kind == "rank":
            whole = [torch.tensor(axis_coordinate(mesh, item.name, r)) for r in range(world)]
        else:
            whole = [prepared[r // mesh.sp][name].clone() for r in range(world)]
        values[name] = ranked([w.clone() for w in whole])
    return values


def whole_gradient(program: RankProgram, name: str, grad: Tensor | None) -> Tensor | None:
    """The gradient of the whole parameter, after the reductions that are the runtime's."""
    if grad is None:
        return None
    mesh, spec = program.mesh, program.params[name]
    parts = [g.clone() for g in on_each_rank(grad)]
    for axes in spec.reduce_axes:
        parts = [sum(parts[o] for o in group_ranks(mesh, axes, r)) for r in range(mesh.world)]  # type: ignore[misc]
    shapes = [spec.shape]
    for shard in spec.shards:
        one = replace(spec, shape=shapes[-1], shards=(shard,))
        shapes.append(one.local_shape(mesh))
    for shard, shape in zip(reversed(spec.shards), reversed(shapes[:-1])):
        joined = []
        for r in range(mesh.world):
            pieces = [parts[o] for o in group_ranks(mesh, shard.axes, r)]
            joined.append(torch.cat(pieces, shard.dim).narrow(shard.dim, 0, shape[shard.dim]))
        parts = joined
    for other in parts[1:]:
        assert torch.allclose(parts[0], other, rtol=1e-4, atol=1e-6), f"ranks disagree on the gradient of {spec.name}"
    return parts[0]


def relative_errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """||difference|| / max(||g||, 1e-6 * global gradient norm) for every gradient."""
    norm = torch.stack([g.norm() for g in want.values()]).norm()
    return {
        n: float((got.get(n, torch.zeros_like(g)) - g).norm() / torch.maximum(g.norm(), 1e-6 * norm))
        for n, g in want.items()
    }


def captured_for(model: nn.Module, batch: Batch) -> tuple[CapturedForward, LoweredInputs]:
    return capture_forward(model, batch, segments=8)


def run_parity(
    model: nn.Module, batches: list[Batch], mesh: Mesh, blocks: dict[str, BlockPlan], joined: Batch | None = None
) -> Parity:
    """Lower `model` for `mesh` and compare. batches: one per data rank, of equal shapes. joined: the global batch, for the
    reference, where it is not the same to run them one after the other."""
    assert len(batches) == mesh.data_ranks
    want_loss, want = reference_joined(model, joined) if joined is not None else reference(model, batches)
    captured, inputs = captured_for(model, batches[0])
    start_fake_group(mesh.world)
    tokens = batches[0]["input_ids"].shape[1]
    program = lower_forward(program_of(captured, model, mesh, blocks, tokens))
    bind_fake_groups(program)
    prepared = [inputs.prepare(batch) for batch in batches]
    targets = sum(shifted_targets(b) for b in batches)
    with local_ranks_mode(mesh.world):
        values = placeholder_values(program, captured, prepared, model, targets)
        order = [n.name for n in program.gm.graph.find_nodes(op="placeholder")]
        loss = program.gm(*(values[name] for name in order))[0]
        loss.backward()
        loss_value = sum(float(v) for v in on_each_rank(loss.detach()))
        got = {}
        for name, spec in program.params.items():
            grad = whole_gradient(program, name, values[name].grad)
            if grad is not None:
                got[spec.name] = grad
    return Parity(abs(loss_value - want_loss) / abs(want_loss), relative_errors(got, want), program)
