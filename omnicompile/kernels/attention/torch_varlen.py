"""Attention by torch.nn.attention.varlen: flash-attention, or cuDNN where torch prefers it. Dense batches are segments
of equal length."""

from __future__ import annotations

from torch import Tensor

from omnicompile.kernels.attention.call import Call, heads, in_segments, rows
from omnicompile.kernels.registry import Functions
from omnicompile.torch_compat import varlen_backward, varlen_forward


def _joined(x: Tensor) -> Tensor:
    """[batch, heads, len, d] -> [batch * len, heads, d]"""
    return rows(x, False).flatten(0, 1)


def _apart(x: Tensor, like: Tensor) -> Tensor:
    return heads(x.unflatten(0, (like.shape[0], like.shape[2])), False)


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    cu_q, cu_k = call.bounds(q, k)
    flat, sizes = [_joined(t) for t in (q, k, v)], (q.shape[2], k.shape[2])
    out, lse = varlen_forward(flat, (cu_q, cu_k), sizes, call.scale, call.sides())
    out = in_segments(out, cu_q if call.packed else None)
    return _apart(out, q), lse.unflatten(1, (q.shape[0], q.shape[2])).transpose(0, 1)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cu_q, cu_k = call.bounds(q, k)
    flat_grad, *flat = (_joined(t) for t in (grad, q, k, v, out))
    flat_lse = lse.transpose(0, 1).flatten(1).contiguous()
    sizes = q.shape[2], k.shape[2]
    grads = varlen_backward(flat_grad, flat, flat_lse, (cu_q, cu_k), sizes, call.scale, call.sides())
    ends = (cu_q, cu_k, cu_k) if call.packed else (None, None, None)
    dq, dk, dv = (_apart(in_segments(g, end), t) for g, end, t in zip(grads, ends, (q, k, v)))
    return dq, dk, dv, q.new_empty(0)


FUNCTIONS = Functions(forward, backward)
