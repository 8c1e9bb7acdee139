"""Proves a lowering on a tiny copy of the model: all ranks in one process against the single-process model.

The reference is the user's own model, untouched, on the concatenated batches of all data ranks: no graph, no anchor.
Equal means, for the loss and every gradient g, ||difference|| / max(||g||, 1e-6 * global gradient norm) within the
tolerance: 1e-9 in float64, 1e-5 in float32 and where a float64 model computes parts in float32.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from omnicompile.errors import InputError, LoweringError, VerificationError
from omnicompile.lowering.driver import find_targets, rank_program, with_outputs
from omnicompile.lowering.full_size import token_lengths
from omnicompile.lowering.graph_capture import CapturedForward, LoweredInputs, capture_forward
from omnicompile.lowering.tiny import Batch, TinyModel
from omnicompile.passes import lower_forward
from omnicompile.passes.dropout import KeyedDropout
from omnicompile.passes.functional import remove_mutation_pass
from omnicompile.passes.loss import count_values
from omnicompile.passes.rank_program import GROUP_PREFIX, RankProgram
from omnicompile.passes.simulate import SIMULATED_SEED, run_ranks
from omnicompile.passes.verifier import verify_lowering
from omnicompile.plan import Plan

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
_SEGMENTS = 8
_MOST_ROUNDING = 1e-3  # of a gradient, where float32 is ill-conditioned; a wrong program is further off
_LEEWAY = 4.0


@dataclass(frozen=True)
class ProofReport:
    """loss: of the single process, often computed in float32 whatever the model's dtype. loss_error: relative.
    errors: by parameter. collectives: (what, over which axes) -> how many in the forward. nodes: values that the
    placement verifier compared; verdict: what it found wrong."""

    model: str
    plan: Plan
    loss: float
    loss_error: float
    errors: dict[str, float]
    tolerance: float
    loss_tolerance: float
    collectives: dict[tuple[str, str], int]
    nodes: int = 0
    verdict: str = ""
    notes: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        return self.loss_error <= self.loss_tolerance and self.worst[1] <= self.tolerance and not self.verdict

    @property
    def worst(self) -> tuple[str, float]:
        return max(self.errors.items(), key=lambda item: item[1], default=("", 0.0))

    def worst_first(self, count: int) -> list[tuple[str, float]]:
        return sorted(self.errors.items(), key=lambda item: -item[1])[:count]


@dataclass(frozen=True)
class TinyProgram:
    """A tiny model's captured forward, with its inputs, and the program that the passes start from."""

    captured: CapturedForward
    inputs: LoweredInputs
    before: RankProgram


def capture_tiny(tiny: TinyModel, plan: Plan) -> TinyProgram:
    """Computes in the tiny model's own dtype, whatever the plan says."""
    batch = tiny.batch(0)
    captured, inputs = capture_forward(tiny.model, batch, _SEGMENTS)
    if "loss" not in captured.outputs:
        raise LoweringError("the model returned no loss: give it `labels`, or wrap it to return a scalar loss")
    captured = with_outputs(captured, ("loss",))
    dtype = next(p.dtype for p in tiny.model.parameters() if p.is_floating_point())
    name = str(dtype).removeprefix("torch.")
    plan = replace(plan, param_dtype=name, reduce_dtype=name)
    grads = {name: p.requires_grad for name, p in tiny.model.named_parameters(remove_duplicate=False)}
    return TinyProgram(captured, inputs, rank_program(captured, plan, grads, token_lengths(batch), dtype))


def prove(tiny: TinyModel, plan: Plan, name: str = "", check_values: bool = True) -> ProofReport:
    """Loss and every gradient under `plan` on all its ranks, compared with the single process.

    check_values: also run the placement verifier over every value of the forward, which doubles the time.
    `plan` must be of the size to run (`reduced_plan`). Raises what capturing and lowering raise, and
    VerificationError if the program does not run.
    """
    program = capture_tiny(tiny, plan)
    lowered = lower_forward(program.before)
    batches, prepared, uneven = _prepared(tiny, program, plan.mesh.data_ranks)
    loss, want = _reference(tiny.model, batches)
    targets = find_targets(program.captured)
    counts = [targets.counts(values) if targets is not None else () for values in prepared]
    known = _fixed(program, tiny.model) | count_values([sum(parts) for parts in zip(*counts)])

    def whole(placeholder: str, data_rank: int) -> Tensor:
        return known[placeholder] if placeholder in known else prepared[data_rank][placeholder]

    losses, got = _run(lowered, whole)
    first = _first_names(tiny.model)
    errors = relative_errors({first[n]: g for n, g in got.items()}, want)
    dtype = next(iter(want.values())).dtype
    tolerance, notes = TOLERANCE[dtype], [*tiny.notes, *uneven, *lowered.notes]
    loss_error = abs(sum(losses) - float(loss)) / max(abs(float(loss)), 1e-30)
    loss_tolerance = TOLERANCE[loss.dtype]
    if loss_error > loss_tolerance and _computes_in_float32(program.captured.gm):
        loss_tolerance = TOLERANCE[torch.float32]  # a float64 sum of losses of which one is float32
    if max(errors.values()) > tolerance and dtype is torch.float64 and _computes_in_float32(program.captured.gm):
        tolerance = TOLERANCE[torch.float32]
        notes.append("parts of the model compute in float32")
        if beyond := {name: error for name, error in errors.items() if error > tolerance}:
            rounding = _rounding(tiny.model, batches, want)
            if all(error <= min(_MOST_ROUNDING, _LEEWAY * rounding.get(name, 0.0)) for name, error in beyond.items()):
                tolerance = _MOST_ROUNDING
                notes.append(f"{len(beyond)} gradients are as exact as float32 makes them, within {_MOST_ROUNDING:.0e}")
    nodes, verdict = 0, ""
    if check_values:
        values = _fixed(program, tiny.model) | prepared[0]
        nodes, verdict = _verdict(program, lowered, values, counts[0], loss_tolerance)
    return ProofReport(
        model=name or type(tiny.model).__name__,
        plan=plan,
        loss=float(loss),
        loss_error=loss_error,
        errors=errors,
        tolerance=tolerance,
        loss_tolerance=loss_tolerance,
        collectives=count_collectives(lowered),
        nodes=nodes,
        verdict=verdict,
        notes=tuple(notes),
    )  # fmt: skip


def _prepared(
    tiny: TinyModel, program: TinyProgram, data_ranks: int
) -> tuple[list[Batch], list[dict[str, Tensor]], list[str]]:
    """Each data rank's batch, the tensors that the graph takes of it, and what there is to note."""
    batches = [tiny.batch(rank) for rank in range(data_ranks)]
    try:
        return batches, [program.inputs.prepare(batch) for batch in batches], []
    except (LoweringError, InputError):
        if tiny.even is None:
            raise
    batches = [tiny.even(rank) for rank in range(data_ranks)]
    note = "images of one shape on all ranks: the model has another graph for each, and other batches are refused"
    return batches, [program.inputs.prepare(batch) for batch in batches], [note]


def _rounding(model: nn.Module, batches: list[Batch], want: Mapping[str, Tensor]) -> dict[str, float]:
    """What float32 makes uncertain in every gradient, relative to it: how much it changes in one process when the
    weights are rounded, and no less than one rounding of the norm of all gradients."""
    generator = torch.Generator().manual_seed(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                noise = torch.randn(p.shape, generator=generator).to(p.dtype)
                p.mul_(1 + noise * torch.finfo(torch.float32).eps)
    _, moved = _reference(model, batches)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(before[name])
    changes = relative_errors(moved, want)
    norm = torch.stack([g.norm() for g in want.values()]).norm()
    unit = torch.finfo(torch.float32).eps
    return {n: max(changes[n], unit * float(norm / g.norm().clamp_min(1e-6 * norm))) for n, g in want.items()}


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter -> the first of its names, by which tied parameters have their gradient."""
    first = {id(p): name for name, p in model.named_parameters()}
    return {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}


def _computes_in_float32(gm: fx.GraphModule) -> bool:
    values = (node.meta.get("val") for node in gm.graph.nodes if node.op == "call_function")
    return any(isinstance(v, Tensor) and v.dtype is torch.float32 and v.dim() > 0 for v in values)


def _run(lowered: RankProgram, whole: Any) -> tuple[list[float], dict[str, Tensor]]:
    try:
        losses, grads, _ = run_ranks(lowered, whole)
    except (RuntimeError, AssertionError, IndexError, ValueError, TypeError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise VerificationError(f"the lowered forward does not run: {type(error).__name__}: {first}") from error
    return losses, grads


def _verdict(
    program: TinyProgram,
    lowered: RankProgram,
    values: Mapping[str, Tensor],
    targets: tuple[int, ...],
    tolerance: float,
) -> tuple[int, str]:
    # A value that is changed in place afterwards could not be compared.
    original = remove_mutation_pass(program.before.copy(), None)
    try:
        return verify_lowering(original, lowered, values, targets, tolerance).nodes, ""
    except VerificationError as error:
        return 0, str(error)


def _fixed(program: TinyProgram, model: nn.Module) -> dict[str, Tensor]:
    """Whole parameters, buffers and constants, by placeholder."""
    params = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    values = {p: params[spec.name].detach() for p, spec in program.before.params.items()}
    values |= {p: buffers[name].detach() for p, name in program.captured.buffers.items()}
    return values | program.captured.constants


def _reference(model: nn.Module, batches: list[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients by name of the single-process model on the batches of all data ranks as one batch. Its dropout
    goes by place, as that of the lowered program."""
    model.zero_grad()
    with KeyedDropout(SIMULATED_SEED):
        output = model(**joined(batches))
    loss = output if isinstance(output, Tensor) else output["loss"] if isinstance(output, Mapping) else output.loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), grads


def joined(batches: list[Batch]) -> Batch:
    """One batch of the rows of all; position ids with a leading axis of positions are joined along their rows."""
    result: Batch = {}
    for name, value in batches[0].items():
        values = [batch[name] for batch in batches]
        if isinstance(value, Tensor):
            rows = 1 if name == "position_ids" and value.dim() == 3 else 0
            result[name] = torch.cat(values, rows)
        else:
            result[name] = list(itertools.chain(*values)) if isinstance(value, list) else value
    return result


def relative_errors(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, float]:
    """||difference|| / max(||g||, 1e-6 * global gradient norm) for every gradient g, those that should not be too."""
    norm = torch.stack([g.norm() for g in want.values()]).norm()
    zero = torch.zeros(())
    errors = {}
    for name in dict.fromkeys([*want, *got]):
        g = want.get(name, zero.to(norm.dtype))
        difference = (got.get(name, torch.zeros_like(g)) - g).norm()
        errors[name] = float(difference / torch.maximum(g.norm(), 1e-6 * norm))
    return errors


def count_collectives(program: RankProgram) -> dict[tuple[str, str], int]:
    """(function, axes of its group) -> how often it stands in the forward."""
    found: Counter[tuple[str, str]] = Counter()
    for node in program.gm.graph.nodes:
        axes = [a for a in [*node.args, *node.kwargs.values()] if isinstance(a, str) and a.startswith(GROUP_PREFIX)]
        if node.op == "call_function" and axes:
            found[(getattr(node.target, "__name__", str(node.target)), axes[-1].removeprefix(GROUP_PREFIX))] += 1
    return dict(found)
