"""Attention by the package flash-attn (FlashAttention-2). Its forward and backward are called apart, since the operator
keeps output and log-sum-exp itself."""

from __future__ import annotations

import torch
from flash_attn.flash_attn_interface import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
)
from torch import Tensor

from omnicompile.kernels.attention.call import Call, heads, in_segments, rows
from omnicompile.kernels.registry import Functions


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    left, right = call.sides()
    options = {
        "dropout_p": 0.0, "softmax_scale": call.scale, "causal": call.causal, "window_size_left": left,
        "window_size_right": right, "softcap": call.softcap, "alibi_slopes": None, "return_softmax": False,
    }  # fmt: skip
    inputs = [rows(t, call.packed) for t in (q, k, v)]
    if not call.packed:
        out, lse, *_ = _flash_attn_forward(*inputs, **options)
        return heads(out, False), lse
    cu_q, cu_k = call.bounds(q, k)
    out, lse, *_ = _flash_attn_varlen_forward(*inputs, cu_q, cu_k, q.shape[2], k.shape[2], **options)
    return heads(in_segments(out, cu_q), True), lse.unsqueeze(0)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    left, right = call.sides()
    options = {
        "dropout_p": 0.0, "softmax_scale": call.scale, "causal": call.causal, "window_size_left": left,
        "window_size_right": right, "softcap": call.softcap, "alibi_slopes": None, "deterministic": False,
    }  # fmt: skip
    inputs = [rows(t, call.packed) for t in (grad, q, k, v, out)]
    grads = [torch.empty_like(t) for t in inputs[1:4]]
    if not call.packed:
        _flash_attn_backward(*inputs, lse.contiguous(), *grads, **options)
        dq, dk, dv = (heads(g, False) for g in grads)
        return dq, dk, dv, q.new_empty(0)
    cu_q, cu_k = call.bounds(q, k)
    sizes = q.shape[2], k.shape[2]
    _flash_attn_varlen_backward(*inputs, lse.squeeze(0).contiguous(), *grads, cu_q, cu_k, *sizes, **options)
    dq, dk, dv = (heads(in_segments(g, cu), True) for g, cu in zip(grads, (cu_q, cu_k, cu_k)))
    return dq, dk, dv, q.new_empty(0)


FUNCTIONS = Functions(forward, backward)
