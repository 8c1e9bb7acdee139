"""Attention by plain operators, one segment after the other, with every score in memory. It does all that the operator
means."""

from __future__ import annotations

import torch
from torch import Tensor

from omnicompile.kernels.attention.call import Call
from omnicompile.kernels.registry import Functions


def segments(call: Call, q_len: int, kv_len: int) -> list[tuple[int, int, int, int]]:
    """(q start, q end, k start, k end) of each segment that holds at least one query."""
    if call.cu_q is None or call.cu_k is None:
        return [(0, q_len, 0, kv_len)]
    q_bounds, k_bounds = call.cu_q.tolist(), call.cu_k.tolist()
    pairs = zip(q_bounds[:-1], q_bounds[1:], k_bounds[:-1], k_bounds[1:])
    return [(qs, qe, ks, ke) for qs, qe, ks, ke in pairs if qe > qs]


def accumulate_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _scores(q: Tensor, k: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Masked scores and, for the backward of the soft cap, the capped but unmasked ones. [b, kv, group, q, k]."""
    raw = torch.einsum("bhgqd,bhkd->bhgqk", q, k) * call.scale
    if call.softcap > 0:
        raw = torch.tanh(raw / call.softcap) * call.softcap
    q_len, kv_len = raw.shape[-2:]
    if not call.causal and call.window <= 0:
        return raw, raw
    # The last query is aligned with the last key, as flash-attention does for q_len != kv_len.
    row = torch.arange(q_len, device=q.device).unsqueeze(1) + (kv_len - q_len)
    col = torch.arange(kv_len, device=q.device).unsqueeze(0)
    hidden = torch.zeros(q_len, kv_len, dtype=torch.bool, device=q.device)
    if call.causal:
        hidden = hidden | (col > row)
    if call.window > 0:
        hidden = hidden | (col <= row - call.window)
        if not call.causal:
            hidden = hidden | (col >= row + call.window)
    return raw.masked_fill(hidden, float("-inf")), raw


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[b, heads, s, d] -> [b, kv_heads, heads / kv_heads, s, d]"""
    return x.unflatten(1, (kv_heads, x.shape[1] // kv_heads))


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Output [batch, heads, q_len, v_head_dim] and log-sum-exp [batch, heads, q_len]."""
    dtype, kv_heads = accumulate_dtype(q), k.shape[1]
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = torch.zeros(q.shape[:3], dtype=dtype, device=q.device)
    sink = None if call.sinks is None else call.sinks.to(dtype).view(1, kv_heads, -1, 1, 1)
    for qs, qe, ks, ke in segments(call, q.shape[2], k.shape[2]):
        qg = _grouped(q[:, :, qs:qe].to(dtype), kv_heads)
        scores, _ = _scores(qg, k[:, :, ks:ke].to(dtype), call)
        seg_lse = scores.logsumexp(-1, keepdim=True)
        if sink is not None:
            seg_lse = torch.logaddexp(seg_lse, sink.expand_as(seg_lse))
        weights = (scores - seg_lse).exp()
        seg = torch.einsum("bhgqk,bhkd->bhgqd", weights, v[:, :, ks:ke].to(dtype))
        out[:, :, qs:qe] = seg.flatten(1, 2).to(q.dtype)
        lse[:, :, qs:qe] = seg_lse.squeeze(-1).flatten(1, 2)
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the sinks (an empty tensor when there are none)."""
    dtype, kv_heads = lse.dtype, k.shape[1]
    grads = tuple(torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (q, k, v))
    sink_grad = torch.zeros(0 if call.sinks is None else call.sinks.shape[0], dtype=dtype, device=q.device)
    for qs, qe, ks, ke in segments(call, q.shape[2], k.shape[2]):
        qg, gg, og = (_grouped(t[:, :, qs:qe].to(dtype), kv_heads) for t in (q, grad, out))
        kg, vg = k[:, :, ks:ke].to(dtype), v[:, :, ks:ke].to(dtype)
        seg_lse = _grouped(lse[:, :, qs:qe].unsqueeze(-1), kv_heads)
        scores, raw = _scores(qg, kg, call)
        weights = (scores - seg_lse).exp()
        delta = (gg * og).sum(-1, keepdim=True)
        d_scores = weights * (torch.einsum("bhgqd,bhkd->bhgqk", gg, vg) - delta)
        if call.softcap > 0:
            d_scores = d_scores * (1 - (raw / call.softcap) ** 2)
        grads[0][:, :, qs:qe] += torch.einsum("bhgqk,bhkd->bhgqd", d_scores, kg).flatten(1, 2) * call.scale
        grads[1][:, :, ks:ke] += torch.einsum("bhgqk,bhgqd->bhkd", d_scores, qg) * call.scale
        grads[2][:, :, ks:ke] += torch.einsum("bhgqk,bhgqd->bhkd", weights, gg)
        if call.sinks is not None:
            weight = (call.sinks.to(dtype).view(1, kv_heads, -1, 1, 1) - seg_lse).exp()
            sink_grad += -(weight * delta).sum((0, 3, 4)).flatten()
    sink_dtype = q.dtype if call.sinks is None else call.sinks.dtype
    dq, dk, dv = (g.to(t.dtype) for g, t in zip(grads, (q, k, v)))
    return dq, dk, dv, sink_grad.to(sink_dtype)


FUNCTIONS = Functions(forward, backward)
