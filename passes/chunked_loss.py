"""The chunked loss head: linear and cross-entropy a chunk of tokens at a time, so that the logits never exist whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from omnicompile.cost_model.step_chain import LOSS_CHUNK_ROWS
from omnicompile.passes.propagate import module_of, schema_values
from omnicompile.passes.rank_program import RankProgram
from omnicompile.plan import LossHead, Plan

aten = torch.ops.aten
_SUM = 2  # aten's code of `reduction`
_VIEWS = frozenset({aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten._unsafe_view.default,
                    aten.contiguous.default, aten.alias.default})  # fmt: skip
_CASTS = frozenset({aten.to.dtype, aten._to_copy.default})
ROLE = "chunked_loss"

# Applied to the logits of a chunk, in order: ("scale", factor), ("tanh", None), ("cast", dtype).
Step = tuple[str, Any]


def fuse_loss_head_pass(program: RankProgram, plan: Plan | None = None, rows: int = LOSS_CHUNK_ROWS) -> RankProgram:
    """Fuse the head's linear with the cross-entropy that reads its logits, if the plan asks for the chunked loss head.

    Before: `z = linear(h, w); l = cross_entropy_loss(view(to(z, float32)), y, reduction=sum)`.
    After: `l = chunked_cross_entropy(h, w, y)`, which has `rows` tokens' logits at a time and computes the gradients of
    h and w with the loss, to be multiplied by the incoming cotangent in the backward.

    Safe because a sum over tokens is the sum over chunks, and its gradient is linear in the cotangent of the loss.
    Scaled and soft-capped logits are understood. A head that is anything else, or whose logits something else reads,
    stays whole, and `program.notes` says why. A program that gives its logits out is left alone. It works on what a
    rank holds of h and y, so it runs after these are cut over ranks.
    """
    if (plan.loss_head if plan is not None else program.loss_head) is not LossHead.CHUNKED:
        return program
    if any(node.meta["val"].dim() for node in program.output_nodes()):
        program.log.append("chunked loss: none, since the logits are asked for")
        return program
    losses = list(program.gm.graph.find_nodes(op="call_function", target=aten.cross_entropy_loss.default))
    fused = 0
    for node in losses:
        match = _match(node)
        if isinstance(match, str):
            program.notes.append(f"the loss in {module_of(node)} keeps its logits whole: {match}")
        else:
            _replace(program, node, match, rows)
            fused += 1
    if not losses and not has_chunked_loss(program):
        program.notes.append("there is no cross-entropy whose head could be chunked")
    program.gm.graph.eliminate_dead_code()
    program.gm.graph.lint()
    program.gm.recompile()
    program.log.append(f"chunked loss: {fused} of {len(losses)} heads, {rows} tokens at a time")
    return program


def has_chunked_loss(program: RankProgram) -> bool:
    """Whether this pass, or the kernel pass before it, has fused a head of this program."""
    return any(node.meta.get("role") == ROLE for node in program.gm.graph.nodes)


@dataclass(frozen=True)
class _Head:
    linear: fx.Node
    steps: tuple[Step, ...]


def _match(loss: fx.Node) -> _Head | str:
    """The linear whose rows the loss reads, or why there is none."""
    values = schema_values(loss)
    logits, target = values["self"], values["target"]
    if values["reduction"] != _SUM or values["weight"] is not None or values["label_smoothing"]:
        return "only a sum over targets without class weights and label smoothing can be chunked"
    if logits.meta["val"].dim() != 2 or target.meta["val"].dim() != 1:
        return "its logits are not a [tokens, classes] matrix with one class a token"
    steps: list[Step] = []
    node, reader, classes = logits, loss, logits.meta["val"].shape[-1]
    while node.target is not aten.linear.default:
        step = _step_of(node)
        if set(node.users) != {reader}:
            return "its logits are read elsewhere too"
        if step is None or node.meta["val"].shape[-1] != classes:
            return f"between the head and the loss stands {node.target}"
        steps += step
        node, reader = node.args[0], node
        if not isinstance(node, fx.Node) or node.op != "call_function":
            return "its logits do not come from a linear layer"
    if set(node.users) != {reader}:
        return "its logits are read elsewhere too"
    return _Head(node, tuple(reversed(steps)))


def _step_of(node: fx.Node) -> list[Step] | None:
    """What a node does to the logits; None if it is not understood."""
    if node.target in _VIEWS or _keeps_all(node):
        return []
    if node.target in _CASTS:
        return [("cast", node.meta["val"].dtype)]
    if node.target is aten.tanh.default:
        return [("tanh", None)]
    factor = node.args[1] if len(node.args) == 2 else None
    if isinstance(factor, int | float) and not isinstance(factor, bool):
        if node.target is aten.mul.Tensor:
            return [("scale", float(factor))]
        if node.target is aten.div.Tensor:
            return [("scale", 1.0 / factor)]
    return None


def _keeps_all(node: fx.Node) -> bool:
    """A slice of everything."""
    source = node.args[0] if node.args else None
    if node.target is not aten.slice.Tensor or not isinstance(source, fx.Node):
        return False
    return bool(source.meta["val"].shape == node.meta["val"].shape)


def _replace(program: RankProgram, loss: fx.Node, head: _Head, rows: int) -> None:
    values, linear = schema_values(loss), schema_values(head.linear)
    args = (
        linear["input"],
        linear["weight"],
        linear["bias"],
        values["target"],
        values["ignore_index"],
        rows,
        head.steps,
    )
    with program.gm.graph.inserting_before(loss):
        new = program.gm.graph.call_function(chunked_cross_entropy, args)
    new.meta = {**loss.meta, "role": ROLE}
    loss.replace_all_uses_with(new)


# At run time -------------------------------------------------------------------------------------------------------


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore: int, rows: int, steps: tuple[Step, ...]
) -> Tensor:
    """Sum over tokens of -log softmax(steps(hidden @ weight.T + bias))[target], 0 where the target is `ignore`.

    hidden [..., hidden], weight [classes, hidden], bias [classes], target [tokens]. The gradient of the weight is
    summed over chunks in the weight's dtype, in one buffer.
    """
    return _ChunkedLoss.apply(hidden, weight, bias, target, ignore, rows, steps)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        ignore: int,
        rows: int,
        steps: Any,
    ) -> Tensor:
        flat, labels = hidden.flatten(0, -2), target.flatten()
        sums = _Sums(ctx.needs_input_grad[:3])
        for start in range(0, flat.shape[0], rows):
            piece, wanted = flat[start : start + rows], labels[start : start + rows]
            sums.add(piece, weight, bias, wanted, ignore, steps)
        d_hidden = torch.cat(sums.hidden).view(hidden.shape) if sums.hidden else None
        ctx.save_for_backward(d_hidden, sums.weight, sums.bias)
        assert sums.loss is not None
        return sums.loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        scaled = (None if saved is None else saved * grad for saved in ctx.saved_tensors)
        return *scaled, None, None, None, None


class _Sums:
    """Loss and gradients over the chunks so far. wanted: whether hidden, weight and bias need a gradient."""

    def __init__(self, wanted: tuple[bool, ...]) -> None:
        self.wanted = wanted
        self.loss: Tensor | None = None
        self.hidden: list[Tensor] = []
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def add(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore: int, steps: tuple[Step, ...]
    ) -> None:
        logits = torch.nn.functional.linear(hidden, weight, bias)
        loss, grad = _loss_and_gradient(logits, target, ignore, steps, any(self.wanted))
        del logits
        self.loss = loss if self.loss is None else self.loss + loss
        if grad is None:
            return
        if self.wanted[0]:
            self.hidden.append(grad @ weight)
        if self.wanted[1]:
            self.weight = grad.t() @ hidden if self.weight is None else self.weight.addmm_(grad.t(), hidden)
        if self.wanted[2]:
            part = grad.sum(0)
            self.bias = part if self.bias is None else self.bias + part


def _loss_and_gradient(
    logits: Tensor, target: Tensor, ignore: int, steps: tuple[Step, ...], wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss of a chunk [tokens, classes] and the gradient of its logits, computed in float32 or better."""
    value, back = _transformed(logits, steps)
    given = value.dtype
    value = value.to(torch.promote_types(given, torch.float32))
    valid = target != ignore
    index = torch.where(valid, target, 0).unsqueeze(1)
    norm = value.logsumexp(-1, keepdim=True)
    loss = torch.where(valid.unsqueeze(1), norm - value.gather(1, index), 0.0).sum().to(given)
    if not wanted:
        return loss, None
    grad = (value - norm).exp_()
    del value
    grad.scatter_add_(1, index, torch.full_like(norm, -1.0)).mul_(valid.unsqueeze(1))
    grad = grad.to(given)
    for undo in reversed(back):
        grad = undo(grad)
    return loss, grad


def _transformed(logits: Tensor, steps: tuple[Step, ...]) -> tuple[Tensor, list[Callable[[Tensor], Tensor]]]:
    """The logits as the loss sees them, and how a gradient goes back through each step."""
    value = logits
    back: list[Callable[[Tensor], Tensor]] = []
    for kind, argument in steps:
        if kind == "cast":
            back.append(_cast_to(value.dtype))
            value = value.to(argument)
        elif kind == "scale":
            back.append(_scaled_by(argument))
            value = value * argument
        else:
            value = value.tanh()
            back.append(_through_tanh(value))
    return value, back


def _cast_to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda grad: grad.to(dtype)


def _scaled_by(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda grad: grad * factor


def _through_tanh(output: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda grad: grad * (1 - output * output)
