"""The attention operator by torch's fused CPU kernel, which keeps no matrix of scores.

For what the kernel can: no soft cap, no sinks, heads of one size. Layouts and meanings as in `attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def is_fused(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, softcap: float) -> bool:
    """Whether the kernel computes this."""
    same = q.shape[-1] == k.shape[-1] == v.shape[-1] and q.dtype == k.dtype == v.dtype
    return q.device.type == "cpu" and q.is_floating_point() and same and sinks is None and softcap <= 0


def _mask(q: Tensor, k: Tensor, causal: bool, window: int) -> tuple[bool, Tensor | None]:
    """The kernel's own causal flag where it means ours, otherwise [q_len, kv_len] to add to the scores."""
    q_len, kv_len = q.shape[2], k.shape[2]
    if window <= 0 and (not causal or q_len == kv_len):
        return causal, None
    # The last query is aligned with the last key.
    row = torch.arange(q_len).unsqueeze(1) + (kv_len - q_len)
    col = torch.arange(kv_len).unsqueeze(0)
    hidden = col > row if causal else torch.zeros(q_len, kv_len, dtype=torch.bool)
    if window > 0:
        hidden = hidden | (col <= row - window)
        if not causal:
            hidden = hidden | (col >= row + window)
    return False, torch.zeros(q_len, kv_len, dtype=q.dtype).masked_fill_(hidden, float("-inf"))


def _repeated(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _summed(grad: Tensor, kv_heads: int) -> Tensor:
    """The gradient of what `_repeated` has repeated."""
    return grad if grad.shape[1] == kv_heads else grad.unflatten(1, (kv_heads, -1)).sum(2)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def fused_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one segment."""
    causal, mask = _mask(q, k, causal, window)
    heads = q.shape[1]
    out, lse = _forward(
        _rows(q), _rows(_repeated(k, heads)), _rows(_repeated(v, heads)), 0.0, causal, attn_mask=mask, scale=scale
    )
    return out, lse


def fused_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of one segment."""
    causal, mask = _mask(q, k, causal, window)
    heads, kv_heads = q.shape[1], k.shape[1]
    whole = [_rows(t) for t in (grad, q, _repeated(k, heads), _repeated(v, heads), out)]
    dq, dk, dv = _backward(*whole, lse, 0.0, causal, attn_mask=mask, scale=scale)
    return dq, _summed(dk, kv_heads), _summed(dv, kv_heads)
