"""Attention by FlashAttention-3 (`flash_attn_interface`, for Hopper)."""

from __future__ import annotations

import torch
from flash_attn_interface import _flash_attn_backward, _flash_attn_forward
from torch import Tensor

from omnicompile.kernels.attention.call import Call, heads, in_segments, rows
from omnicompile.kernels.registry import Functions


def _packing(q: Tensor, k: Tensor, call: Call) -> dict[str, Tensor | int]:
    if not call.packed:
        return {}
    cu_q, cu_k = call.bounds(q, k)
    sizes = {"max_seqlen_q": q.shape[2], "max_seqlen_k": k.shape[2]}
    return {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, **sizes}


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    left, right = call.sides()
    out, lse, *_ = _flash_attn_forward(
        *(rows(t, call.packed) for t in (q, k, v)), softmax_scale=call.scale, causal=call.causal,
        window_size_left=left, window_size_right=right, **_packing(q, k, call),
    )  # fmt: skip
    if not call.packed:
        return heads(out, False), lse
    return heads(in_segments(out, call.cu_q), True), lse.unsqueeze(0)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    left, right = call.sides()
    inputs = [rows(t, call.packed) for t in (grad, q, k, v, out)]
    grads = [torch.empty_like(t) for t in inputs[1:4]]
    _flash_attn_backward(
        *inputs, (lse.squeeze(0) if call.packed else lse).contiguous(), dq=grads[0], dk=grads[1], dv=grads[2],
        softmax_scale=call.scale, is_causal=call.causal, window_size_left=left, window_size_right=right,
        **_packing(q, k, call),
    )  # fmt: skip
    ends = (call.cu_q, call.cu_k, call.cu_k) if call.packed else (None, None, None)
    dq, dk, dv = (heads(in_segments(g, end), call.packed) for g, end in zip(grads, ends))
    return dq, dk, dv, q.new_empty(0)


FUNCTIONS = Functions(forward, backward)
