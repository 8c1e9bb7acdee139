"""`omnicompile::attention`: one operator for dense, packed, windowed and cross attention.

Layout: q [batch, heads, q_len, head_dim], k [batch, kv_heads, kv_len, head_dim], v [batch, kv_heads, kv_len,
v_head_dim]; heads is a multiple of kv_heads. With `cu_q`/`cu_k` (int tensors of segment boundaries, the cu_seqlens of
flash-attention) the batch is 1 and attention stays within segments. `window` > 0 limits each query to the `window` keys
up to and including its own position (sliding window); 0 means no limit. `softcap` > 0 caps scores by tanh. `sinks`
[heads] adds one learned score per head to the softmax's denominator.

Returns the output [batch, heads, q_len, v_head_dim] and the log-sum-exp of the scores [batch, heads, q_len] in float32
(float64 for float64 inputs), which the backward reads instead of the attention matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from omnicompile.anchors.attention_cpu import fused_attention, fused_attention_backward, is_fused
from omnicompile.anchors.attention_cuda import flash_attention, flash_attention_backward, is_flash


def _segments(cu_q: Tensor | None, cu_k: Tensor | None, q_len: int, kv_len: int) -> list[tuple[int, int, int, int]]:
    """(q start, q end, k start, k end) of each segment that holds at least one query."""
    if cu_q is None or cu_k is None:
        return [(0, q_len, 0, kv_len)]
    q_bounds, k_bounds = cu_q.tolist(), cu_k.tolist()
    pairs = zip(q_bounds[:-1], q_bounds[1:], k_bounds[:-1], k_bounds[1:])
    return [(qs, qe, ks, ke) for qs, qe, ks, ke in pairs if qe > qs]


def _accumulate_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float, window: int, softcap: float) -> tuple[Tensor, Tensor]:
    """Masked scores and, for the backward of the soft cap, the capped but unmasked ones. [b, kv, group, q, k]."""
    raw = torch.einsum("bhgqd,bhkd->bhgqk", q, k) * scale
    if softcap > 0:
        raw = torch.tanh(raw / softcap) * softcap
    q_len, kv_len = raw.shape[-2:]
    if not causal and window <= 0:
        return raw, raw
    # The last query is aligned with the last key, as flash-attention does for q_len != kv_len.
    row = torch.arange(q_len, device=q.device).unsqueeze(1) + (kv_len - q_len)
    col = torch.arange(kv_len, device=q.device).unsqueeze(0)
    hidden = torch.zeros(q_len, kv_len, dtype=torch.bool, device=q.device)
    if causal:
        hidden = hidden | (col > row)
    if window > 0:
        hidden = hidden | (col <= row - window)
        if not causal:
            hidden = hidden | (col >= row + window)
    return raw.masked_fill(hidden, float("-inf")), raw


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[b, heads, s, d] -> [b, kv_heads, heads / kv_heads, s, d]"""
    return x.unflatten(1, (kv_heads, x.shape[1] // kv_heads))


def _empty_output(q: Tensor, v: Tensor) -> Tensor:
    """[batch, heads, q_len, v_head_dim], laid out in memory as [batch, q_len, heads, v_head_dim]: as flash-attention
    returns it, so that joining the heads afterwards is a view."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


def _laid_out(x: Tensor) -> Tensor:
    """`x` laid out as `_empty_output` says."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@torch.library.custom_op("omnicompile::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    sinks: Tensor | None,
    max_q: int,
    max_k: int,
    causal: bool,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    if is_flash(q, k, v, sinks, softcap):
        out, lse = flash_attention(q, k, v, cu_q, cu_k, causal, scale, window)
        return _laid_out(out), lse.contiguous()
    fused = is_fused(q, k, v, sinks, softcap)
    if fused and cu_q is None:
        out, lse = fused_attention(q, k, v, causal, scale, window)
        return _laid_out(out), lse.contiguous()
    dtype, kv_heads = _accumulate_dtype(q), k.shape[1]
    out = _empty_output(q, v).zero_()
    lse = torch.zeros(q.shape[:3], dtype=dtype, device=q.device)
    sink = None if sinks is None else sinks.to(dtype).view(1, kv_heads, -1, 1, 1)
    for qs, qe, ks, ke in _segments(cu_q, cu_k, q.shape[2], k.shape[2]):
        if fused:
            inputs = (q[:, :, qs:qe], k[:, :, ks:ke], v[:, :, ks:ke])
            out[:, :, qs:qe], lse[:, :, qs:qe] = fused_attention(*inputs, causal, scale, window)
            continue
        qg = _grouped(q[:, :, qs:qe].to(dtype), kv_heads)
        scores, _ = _scores(qg, k[:, :, ks:ke].to(dtype), causal, scale, window, softcap)
        seg_lse = scores.logsumexp(-1, keepdim=True)
        if sink is not None:
            seg_lse = torch.logaddexp(seg_lse, sink.expand_as(seg_lse))
        weights = (scores - seg_lse).exp()
        seg = torch.einsum("bhgqk,bhkd->bhgqd", weights, v[:, :, ks:ke].to(dtype))
        out[:, :, qs:qe] = seg.flatten(1, 2).to(q.dtype)
        lse[:, :, qs:qe] = seg_lse.squeeze(-1).flatten(1, 2)
    return out, lse


@attention.register_fake
def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_output(q, v), q.new_empty(q.shape[:3], dtype=_accumulate_dtype(q))


@torch.library.custom_op("omnicompile::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    sinks: Tensor | None,
    max_q: int,
    max_k: int,
    causal: bool,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the sinks (an empty tensor when there are none)."""
    if is_flash(q, k, v, sinks, softcap):
        dq, dk, dv = flash_attention_backward(grad, q, k, v, out, lse, cu_q, cu_k, causal, scale, window)
        return _laid_out(dq), _laid_out(dk), _laid_out(dv), q.new_empty(0)
    fused = is_fused(q, k, v, sinks, softcap)
    if fused and cu_q is None:
        dq, dk, dv = fused_attention_backward(grad, q, k, v, out, lse, causal, scale, window)
        return _laid_out(dq), _laid_out(dk), _laid_out(dv), q.new_empty(0)
    dtype, kv_heads = lse.dtype, k.shape[1]
    grads = tuple(torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (q, k, v))
    sink_grad = torch.zeros(0 if sinks is None else sinks.shape[0], dtype=dtype, device=q.device)
    for qs, qe, ks, ke in _segments(cu_q, cu_k, q.shape[2], k.shape[2]):
        if fused:
            gs, qg, og, seg_lse = (t[:, :, qs:qe] for t in (grad, q, out, lse))
            kg, vg = k[:, :, ks:ke], v[:, :, ks:ke]
            found = fused_attention_backward(gs, qg, kg, vg, og, seg_lse, causal, scale, window)
            for total, part, (start, end) in zip(grads, found, ((qs, qe), (ks, ke), (ks, ke))):
                total[:, :, start:end] += part
            continue
        qg, gg, og = (_grouped(t[:, :, qs:qe].to(dtype), kv_heads) for t in (q, grad, out))
        kg, vg = k[:, :, ks:ke].to(dtype), v[:, :, ks:ke].to(dtype)
        seg_lse = _grouped(lse[:, :, qs:qe].unsqueeze(-1), kv_heads)
        scores, raw = _scores(qg, kg, causal, scale, window, softcap)
        weights = (scores - seg_lse).exp()
        delta = (gg * og).sum(-1, keepdim=True)
        d_scores = weights * (torch.einsum("bhgqd,bhkd->bhgqk", gg, vg) - delta)
        if softcap > 0:
            d_scores = d_scores * (1 - (raw / softcap) ** 2)
        grads[0][:, :, qs:qe] += torch.einsum("bhgqk,bhkd->bhgqd", d_scores, kg).flatten(1, 2) * scale
        grads[1][:, :, ks:ke] += torch.einsum("bhgqk,bhgqd->bhkd", d_scores, qg) * scale
        grads[2][:, :, ks:ke] += torch.einsum("bhgqk,bhgqd->bhkd", weights, gg)
        if sinks is not None:
            weight = (sinks.to(dtype).view(1, kv_heads, -1, 1, 1) - seg_lse).exp()
            sink_grad += -(weight * delta).sum((0, 3, 4)).flatten()
    sink_dtype = q.dtype if sinks is None else sinks.dtype
    dq, dk, dv = (_laid_out(g.to(t.dtype)) for g, t in zip(grads, (q, k, v)))
    return dq, dk, dv, sink_grad.to(sink_dtype)


@attention_backward.register_fake
def _attention_backward_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    sinks: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (_empty_output(t, t) for t in (q, k, v))
    return dq, dk, dv, q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_q, cu_k, sinks, *static = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k, sinks)
    ctx.static = tuple(static)


def _backward(ctx: Any, grad: Tensor, _lse_grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, sinks = ctx.saved_tensors
    dq, dk, dv, dsinks = torch.ops.omnicompile.attention_backward(grad, *tensors, sinks, *ctx.static)
    return dq, dk, dv, None, None, None if sinks is None else dsinks, *([None] * len(ctx.static))


attention.register_autograd(_backward, setup_context=_setup_context)
