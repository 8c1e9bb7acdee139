"""Loss and every gradient of a lowered forward, on all ranks in one process, against the single-process model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omnicompile.lowering.graph_capture import CapturedForward, LoweredInputs, capture_forward
from omnicompile.passes import lower_forward
from omnicompile.passes.dropout import KeyedDropout
from omnicompile.passes.rank_program import InputSpec, ParamSpec, RankProgram
from omnicompile.passes.simulate import SIMULATED_SEED, run_ranks
from omnicompile.plan import BlockPlan, Mesh

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


def shifted_targets(batch: Batch, shift: int = 1) -> int:
    """Targets of a batch whose model predicts the label `shift` positions ahead."""
    return int((batch["labels"][:, shift:] != -100).sum())


def reference(model: nn.Module, batches: list[Batch], shift: int = 1) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the whole model on all batches, normalised by the targets of all. With dropout, which goes
    by place, there must be one batch."""
    total = sum(shifted_targets(b, shift) for b in batches)
    model.zero_grad()
    value = 0.0
    for batch in batches:
        with KeyedDropout(SIMULATED_SEED):
            loss = model(**batch).loss * (shifted_targets(batch, shift) / total)
        loss.backward()
        value += loss.item()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return value, grads


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
        dim = len(shape) - 1 if shape and shape[-1] == tokens else None
        inputs[name] = InputSpec(name, "host", dim, of_batch=captured.numbers.get(name, ""))
    return RankProgram(captured.gm, mesh, blocks, params, inputs)


def whole_values(program: RankProgram, captured: CapturedForward, model: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers and constants by placeholder."""
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    values = {p: named[spec.name].detach() for p, spec in program.params.items()}
    values |= {p: named[spec.name].detach() for p, spec in program.inputs.items() if spec.kind == "buffer"}
    return values | captured.constants


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
    model: nn.Module,
    batches: list[Batch],
    mesh: Mesh,
    blocks: dict[str, BlockPlan],
    joined: Batch | None = None,
    shift: int = 1,
) -> Parity:
    """Lower `model` for `mesh` and compare.

    batches: one per data rank, of equal shapes. joined: the global batch, for the reference, where it is not the same
    to run them one after the other. shift: see `shifted_targets`.
    """
    assert len(batches) == mesh.data_ranks
    want_loss, want = reference(model, [joined] if joined is not None else batches, shift)
    captured, inputs = captured_for(model, batches[0])
    tokens = batches[0]["labels"].shape[1]
    original = program_of(captured, model, mesh, blocks, tokens)
    program = lower_forward(original)
    fixed = whole_values(original, captured, model)
    prepared = [inputs.prepare(batch) for batch in batches]
    targets = torch.tensor(float(sum(shifted_targets(b, shift) for b in batches)))

    def whole(name: str, data_rank: int) -> Tensor:
        return fixed[name] if name in fixed else prepared[data_rank].get(name, targets)

    losses, got, _ = run_ranks(program, whole)
    return Parity(abs(sum(losses) - want_loss) / abs(want_loss), relative_errors(got, want), program)
