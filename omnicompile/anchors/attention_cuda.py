"""The attention operator by torch's own flash-attention kernel on CUDA GPUs, packed segments in one call.

For what the kernel can: bfloat16 and float16, heads of one size of at most 256 (a multiple of 8), no soft cap, no
sinks, compute capability 8.0 or higher. Layouts and meanings as in `attention`; no matrix of scores is ever made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omnicompile.kernels.attention.call import heads, in_segments, rows

_forward = torch.ops.aten._flash_attention_forward.default
_backward = torch.ops.aten._flash_attention_backward.default
_LARGEST_HEAD = 256
_DTYPES = (torch.bfloat16, torch.float16)


def is_flash(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, softcap: float) -> bool:
    """Whether the kernel computes this."""
    if q.device.type != "cuda" or sinks is not None or softcap > 0:
        return False
    size = q.shape[-1]
    sizes = size == k.shape[-1] == v.shape[-1] and size <= _LARGEST_HEAD and size % 8 == 0
    dtypes = q.dtype in _DTYPES and q.dtype == k.dtype == v.dtype
    return sizes and dtypes and torch.cuda.get_device_capability(q.device) >= (8, 0)


def _windows(causal: bool, window: int) -> dict[str, int]:
    """A query sees its own key and window - 1 before it, and after it without a causal mask."""
    if window <= 0:
        return {}
    return {"window_size_left": window - 1, "window_size_right": 0 if causal else window - 1}


def _bounds(cu: Tensor | None) -> Tensor | None:
    return None if cu is None else cu.to(torch.int32)


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, causal: bool, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Output [batch, heads, q_len, d] and log-sum-exp [batch, heads, q_len] in float32."""
    packed = cu_q is not None and cu_k is not None
    bounds = _bounds(cu_q), _bounds(cu_k)
    out, lse, *_ = _forward(
        *(rows(t, packed) for t in (q, k, v)), *bounds, q.shape[2], k.shape[2], 0.0, causal, False,
        scale=scale, **_windows(causal, window),
    )  # fmt: skip
    return heads(in_segments(out, bounds[0]), packed), lse.unsqueeze(0) if packed else lse


def flash_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    causal: bool,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. Without dropout the kernel reads no random state."""
    packed = cu_q is not None and cu_k is not None
    bounds = _bounds(cu_q), _bounds(cu_k)
    no_random = (
        torch.empty(2, dtype=torch.uint64, device=q.device),
        torch.empty((), dtype=torch.uint64, device=q.device),
    )
    grads = _backward(
        *(rows(t, packed) for t in (grad, q, k, v, out)), (lse.squeeze(0) if packed else lse).contiguous(), *bounds,
        q.shape[2], k.shape[2], 0.0, causal, *no_random, scale=scale, **_windows(causal, window),
    )  # fmt: skip
    dq, dk, dv = (heads(in_segments(g, b), packed) for g, b in zip(grads, (bounds[0], bounds[1], bounds[1])))
    return dq, dk, dv
