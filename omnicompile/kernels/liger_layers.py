"""Normalisation, gates and rotary embeddings by the Triton kernels of the package liger-kernel.

Their kernels write into their inputs in places; what an operator was given is copied first.
"""

from __future__ import annotations

import torch
from liger_kernel.ops.rms_norm import rms_norm_backward, rms_norm_forward
from liger_kernel.ops.rope import rope_backward, rope_forward
from liger_kernel.ops.swiglu import swiglu_backward, swiglu_forward
from liger_kernel.ops.utils import calculate_settings
from torch import Tensor

from omnicompile.kernels import reference
from omnicompile.kernels.layouts import heads_dim
from omnicompile.kernels.registry import Functions

_EARLY, _LATE = 0, 1  # the package's numbers for where the normalised value is rounded


def _normalised(x: Tensor, weight: Tensor, eps: float, offset: float, early_cast: bool) -> tuple[Tensor, Tensor]:
    if not x.numel():
        return reference.rms_norm.forward(x, weight, eps, offset, early_cast)
    mode = _EARLY if early_cast else _LATE
    y, _, root, *_ = rms_norm_forward(x.contiguous(), weight.contiguous(), eps, offset, mode, None)
    return y, root.view(x.shape[:-1])


def _normalised_grad(
    grad: Tensor, x: Tensor, weight: Tensor, root: Tensor, offset: float, early_cast: bool
) -> tuple[Tensor, Tensor]:
    if not x.numel():
        return reference.rms_norm.backward(grad, x, weight, root, offset, early_cast)
    mode = _EARLY if early_cast else _LATE
    block, warps = calculate_settings(x.shape[-1])
    rows = x.contiguous().view(-1, x.shape[-1])
    dx, dw = rms_norm_backward(
        grad.contiguous(), rows, weight.contiguous(), root.flatten(), offset, mode, block, warps, False, None
    )
    return dx, dw


def _own(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    if not gate.numel():
        return torch.empty_like(gate)
    result: Tensor = swiglu_forward(gate.contiguous(), up.contiguous())[2]
    return result


def _gated_grad(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    if not gate.numel():
        return torch.empty_like(gate), torch.empty_like(up)
    width = gate.shape[-1]
    d_gate, d_up = swiglu_backward(_own(gate).view(-1, width), _own(up).view(-1, width), grad.contiguous())
    return d_gate.view(gate.shape), d_up.view(up.shape)


def _arranged(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """A copy of x as [batch, heads, sequence, d], tables as [batch or 1, sequence, d], and the dimension of heads."""
    dim = heads_dim(tuple(x.shape), tuple(cos.shape))
    if dim is None:
        raise ValueError(f"rotary tables {tuple(cos.shape)} for {tuple(x.shape)} are no layout of this kernel")
    moved = x.movedim(dim, x.dim() - 3)
    # The kernel works in place on [batch, sequence, heads, d].
    batched = moved if moved.dim() == 4 else moved.unsqueeze(0)
    own = batched.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
    tables = [t.squeeze(dim) if t.dim() == 4 else t.squeeze(dim).unsqueeze(0) for t in (cos, sin)]
    return own, tables[0], tables[1], dim


def _back(x: Tensor, like: Tensor, dim: int) -> Tensor:
    whole = x if like.dim() == 4 else x.squeeze(0)
    return whole.movedim(like.dim() - 3, dim)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    own, cos, sin, dim = _arranged(x, cos, sin)
    # It rotates queries and keys together: one head stands for the keys.
    done, *_ = rope_forward(own, torch.empty_like(own[:, :1]), cos, sin)
    return _back(done, x, dim)


def _rotated_grad(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    own, cos, sin, dim = _arranged(grad, cos, sin)
    done, _ = rope_backward(own, torch.empty_like(own[:, :1]), cos, sin)
    return _back(done, grad, dim)


rms_norm = Functions(_normalised, _normalised_grad)
swiglu = Functions(_gated, _gated_grad)
rope = Functions(_rotated, _rotated_grad)
