"""Attention by torch's fused CPU kernel (anchors/attention_cpu.py), one segment after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from omnicompile.anchors.attention_cpu import fused_attention, fused_attention_backward
from omnicompile.kernels.attention.call import Call
from omnicompile.kernels.attention.reference import accumulate_dtype, segments
from omnicompile.kernels.registry import Functions


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    static = call.causal, call.scale, call.window
    if not call.packed:
        return fused_attention(q, k, v, *static)
    out = torch.zeros_like(q)
    lse = torch.zeros(q.shape[:3], dtype=accumulate_dtype(q))
    for qs, qe, ks, ke in segments(call, q.shape[2], k.shape[2]):
        found = fused_attention(q[:, :, qs:qe], k[:, :, ks:ke], v[:, :, ks:ke], *static)
        out[:, :, qs:qe], lse[:, :, qs:qe] = found
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    static = call.causal, call.scale, call.window
    if not call.packed:
        return *fused_attention_backward(grad, q, k, v, out, lse, *static), q.new_empty(0)
    grads = tuple(torch.zeros(t.shape, dtype=lse.dtype) for t in (q, k, v))
    for qs, qe, ks, ke in segments(call, q.shape[2], k.shape[2]):
        gs, qg, og, seg_lse = (t[:, :, qs:qe] for t in (grad, q, out, lse))
        kg, vg = k[:, :, ks:ke], v[:, :, ks:ke]
        found = fused_attention_backward(gs, qg, kg, vg, og, seg_lse, *static)
        for total, part, (start, end) in zip(grads, found, ((qs, qe), (ks, ke), (ks, ke))):
            total[:, :, start:end] += part
    dq, dk, dv = (g.to(t.dtype) for g, t in zip(grads, (q, k, v)))
    return dq, dk, dv, q.new_empty(0)


FUNCTIONS = Functions(forward, backward)
