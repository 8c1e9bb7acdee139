"""Attention by FlashAttention-4 (`flash_attn.cute`, for Hopper and Blackwell)."""

from __future__ import annotations

from typing import Any

from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
from torch import Tensor

from omnicompile.kernels.attention.call import Call, heads, in_segments, rows
from omnicompile.kernels.registry import Functions


def _options(q: Tensor, k: Tensor, call: Call) -> dict[str, Any]:
    left, right = (None if side < 0 else side for side in call.sides())
    # A causal mask alone is not a window of theirs.
    sides = {"window_size_left": left, "window_size_right": right} if call.window > 0 else {}
    options: dict[str, Any] = {"softmax_scale": call.scale, "causal": call.causal and call.window <= 0, **sides}
    if call.packed:
        cu_q, cu_k = call.bounds(q, k)
        options |= {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
        options |= {"max_seqlen_q": q.shape[2], "max_seqlen_k": k.shape[2]}
    return options


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    inputs = [rows(t, call.packed) for t in (q, k, v)]
    out, lse, *_ = _flash_attn_fwd(*inputs, return_lse=True, **_options(q, k, call))
    if not call.packed:
        return heads(out, False), lse
    return heads(in_segments(out, call.cu_q), True), lse.unsqueeze(0)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dout, *inputs = (rows(t, call.packed) for t in (grad, q, k, v, out))
    flat = (lse.squeeze(0) if call.packed else lse).contiguous()
    grads = _flash_attn_bwd(*inputs, dout, flat, **_options(q, k, call))
    ends = (call.cu_q, call.cu_k, call.cu_k) if call.packed else (None, None, None)
    dq, dk, dv = (heads(in_segments(g, end), call.packed) for g, end in zip(grads, ends))
    return dq, dk, dv, q.new_empty(0)


FUNCTIONS = Functions(forward, backward)
