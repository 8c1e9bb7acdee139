"""The operators of operators.py in plain torch operators, forward and backward written out."""

from __future__ import annotations

import torch
from torch import Tensor

from omnicompile.kernels.registry import Functions


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _normalised(x: Tensor, weight: Tensor, eps: float, offset: float, early_cast: bool) -> tuple[Tensor, Tensor]:
    values = x.to(_wide(x.dtype))
    root = torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    values = values * root
    if early_cast:
        return (weight + offset) * values.to(x.dtype), root.squeeze(-1)
    return (values * (weight.to(values.dtype) + offset)).to(x.dtype), root.squeeze(-1)


def _normalised_grad(
    grad: Tensor, x: Tensor, weight: Tensor, root: Tensor, offset: float, early_cast: bool
) -> tuple[Tensor, Tensor]:
    dtype, root = root.dtype, root.unsqueeze(-1)
    values = x.to(dtype) * root
    scale = (weight if early_cast else weight.to(dtype)) + offset
    d_values = (grad if early_cast else grad.to(dtype)) * scale
    d_values = d_values.to(dtype)
    seen = values.to(x.dtype) if early_cast else values
    dw = (grad.to(dtype) * seen.to(dtype)).flatten(0, -2).sum(0).to(weight.dtype)
    dx = root * (d_values - values * (d_values * values).mean(-1, keepdim=True))
    return dx.to(x.dtype), dw


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up


def _gated_grad(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.silu_backward(grad * up, gate), grad * torch.nn.functional.silu(gate)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    first, second = x.chunk(2, -1)
    return first, second


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = _halves(x)
    return x * cos + torch.cat((-second, first), -1) * sin


def _rotated_grad(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = _halves(grad * sin)
    return grad * cos + torch.cat((second, -first), -1)


def _loss(logits: Tensor, target: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    values = logits.to(_wide(logits.dtype))
    valid = (target != ignore).unsqueeze(1)
    index = torch.where(valid, target.unsqueeze(1), 0)
    logs = values.log_softmax(-1)
    loss = -torch.where(valid, logs.gather(1, index), 0).sum()
    d_logits = logs.exp_().scatter_add_(1, index, torch.full_like(index, -1, dtype=logs.dtype)).mul_(valid)
    return loss.to(logits.dtype), d_logits.to(logits.dtype)


def _head_loss(hidden: Tensor, weight: Tensor, target: Tensor, ignore: int) -> tuple[Tensor, Tensor, Tensor]:
    logits = hidden @ weight.t()
    loss, d_logits = _loss(logits.to(_wide(logits.dtype)), target, ignore)
    d_logits = d_logits.to(logits.dtype)
    return loss, d_logits @ weight, d_logits.t() @ hidden


def scaled(grad: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
    """The backward of operators that compute their gradients with their value."""
    return tuple(one * grad for one in saved)


rms_norm = Functions(_normalised, _normalised_grad)
swiglu = Functions(_gated, _gated_grad)
rope = Functions(_rotated, _rotated_grad)
cross_entropy = Functions(_loss, scaled)
linear_cross_entropy = Functions(_head_loss, scaled)
