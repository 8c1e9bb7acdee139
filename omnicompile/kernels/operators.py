"""Operators that `passes/kernel_rewrites.py` puts in the place of what a model writes out, each with its backward.

`implementation`: one of `table.py` for the operator, but for "inductor".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from omnicompile.kernels.table import functions_of


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for itself: what sums are kept in."""
    return torch.promote_types(dtype, torch.float32)


def _laid_out_as(result: Tensor, x: Tensor) -> Tensor:
    """`result` with the strides of a new tensor like `x`, which is what tracing takes it to have."""
    wanted = torch.empty_like(x, device="meta").stride()
    return result if result.stride() == wanted else torch.empty_like(x).copy_(result)


# Root mean square normalisation --------------------------------------------------------------------------------------


@torch.library.custom_op("omnicompile::rms_norm", mutates_args=())
def rms_norm(
    input: Tensor, weight: Tensor, eps: float, offset: float, early_cast: bool, implementation: str
) -> tuple[Tensor, Tensor]:
    """x [..., d] / sqrt(mean(x ** 2) + eps) * (weight [d] + offset), and 1 / sqrt(...) [...] in float32 or better.

    early_cast: the normalised value is rounded to x's dtype before it is multiplied, not after.
    """
    y, root = functions_of("rms_norm", implementation).forward(input, weight, eps, offset, early_cast)
    return y.contiguous(), root.contiguous()


@rms_norm.register_fake
def _rms_norm_fake(
    input: Tensor, weight: Tensor, eps: float, offset: float, early_cast: bool, implementation: str
) -> tuple[Tensor, Tensor]:
    return input.new_empty(input.shape), input.new_empty(input.shape[:-1], dtype=wide(input.dtype))


@torch.library.custom_op("omnicompile::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, root: Tensor, offset: float, early_cast: bool, implementation: str
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    dx, dw = functions_of("rms_norm", implementation).backward(grad, x, weight, root, offset, early_cast)
    return dx.contiguous(), dw.contiguous()


@rms_norm_backward.register_fake
def _rms_norm_backward_fake(grad: Tensor, x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _rms_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, offset, early_cast, implementation = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])
    ctx.static = offset, early_cast, implementation


def _rms_norm_grad(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    dx, dw = torch.ops.omnicompile.rms_norm_backward(grad, *ctx.saved_tensors, *ctx.static)
    return dx, dw, None, None, None, None


rms_norm.register_autograd(_rms_norm_grad, setup_context=_rms_norm_setup)


# Gates ---------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("omnicompile::swiglu", mutates_args=())
def swiglu(gate: Tensor, up: Tensor, implementation: str) -> Tensor:
    """silu(gate) * up, of one shape and dtype."""
    result: Tensor = functions_of("swiglu", implementation).forward(gate, up)
    return result.contiguous()


@swiglu.register_fake
def _swiglu_fake(gate: Tensor, up: Tensor, implementation: str) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("omnicompile::swiglu_backward", mutates_args=())
def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, implementation: str) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    d_gate, d_up = functions_of("swiglu", implementation).backward(grad, gate, up)
    return d_gate.contiguous(), d_up.contiguous()


@swiglu_backward.register_fake
def _swiglu_backward_fake(grad: Tensor, gate: Tensor, up: Tensor, implementation: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _swiglu_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.implementation = inputs
    ctx.save_for_backward(gate, up)


def _swiglu_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    d_gate, d_up = torch.ops.omnicompile.swiglu_backward(grad, *ctx.saved_tensors, ctx.implementation)
    return d_gate, d_up, None


swiglu.register_autograd(_swiglu_grad, setup_context=_swiglu_setup)


# Rotary embeddings ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("omnicompile::rope", mutates_args=())
def rope(x: Tensor, cos: Tensor, sin: Tensor, implementation: str) -> Tensor:
    """x * cos + rotated(x) * sin, where rotated([a, b]) = [-b, a] of the halves of the last dimension. cos and sin
    broadcast to x, are of its dtype, and get no gradient."""
    return _laid_out_as(functions_of("rope", implementation).forward(x, cos, sin), x)


@rope.register_fake
def _rope_fake(x: Tensor, cos: Tensor, sin: Tensor, implementation: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("omnicompile::rope_backward", mutates_args=())
def rope_backward(grad: Tensor, cos: Tensor, sin: Tensor, implementation: str) -> Tensor:
    """The gradient of x."""
    return _laid_out_as(functions_of("rope", implementation).backward(grad, cos, sin), grad)


@rope_backward.register_fake
def _rope_backward_fake(grad: Tensor, cos: Tensor, sin: Tensor, implementation: str) -> Tensor:
    return torch.empty_like(grad)


def _rope_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.implementation = inputs
    ctx.save_for_backward(cos, sin)


def _rope_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.omnicompile.rope_backward(grad, *ctx.saved_tensors, ctx.implementation), None, None, None


rope.register_autograd(_rope_grad, setup_context=_rope_setup)


# Losses --------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("omnicompile::cross_entropy", mutates_args=())
def cross_entropy(logits: Tensor, target: Tensor, ignore: int, implementation: str) -> tuple[Tensor, Tensor]:
    """Sum over tokens of -log softmax(logits [tokens, classes])[target [tokens]], 0 where the target is `ignore`, and
    its gradient with respect to the logits. Both in the logits' dtype."""
    loss, d_logits = functions_of("cross_entropy", implementation).forward(logits, target, ignore)
    return loss, d_logits.contiguous()


@cross_entropy.register_fake
def _cross_entropy_fake(logits: Tensor, target: Tensor, ignore: int, implementation: str) -> tuple[Tensor, Tensor]:
    return logits.new_empty(()), logits.new_empty(logits.shape)


def _cross_entropy_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _cross_entropy_grad(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    (d_logits,) = ctx.saved_tensors
    return d_logits * grad, None, None, None


cross_entropy.register_autograd(_cross_entropy_grad, setup_context=_cross_entropy_setup)


@torch.library.custom_op("omnicompile::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, ignore: int, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`cross_entropy` of the logits hidden [tokens, hidden] @ weight.T [hidden, classes], in float32 or better, with
    its gradients with respect to hidden and weight. The logits need not exist whole."""
    loss, d_hidden, d_weight = functions_of("linear_cross_entropy", implementation).forward(
        hidden, weight, target, ignore
    )
    return loss, d_hidden.contiguous(), d_weight.contiguous()


@linear_cross_entropy.register_fake
def _linear_cross_entropy_fake(
    hidden: Tensor, weight: Tensor, target: Tensor, ignore: int, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=wide(hidden.dtype))
    return loss, hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _linear_cross_entropy_grad(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    d_hidden, d_weight = ctx.saved_tensors
    return d_hidden * grad, d_weight * grad, None, None, None


linear_cross_entropy.register_autograd(_linear_cross_entropy_grad, setup_context=_cross_entropy_setup)
