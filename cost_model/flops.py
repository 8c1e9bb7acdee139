"""FLOPs by shape. A multiply and an add count as two; expressions may be sympy or numbers.

torch's FlopCounterMode counts neither CPU flash attention nor grouped GEMM, and knows no segment lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def gemm_flops(m: Any, n: Any, k: Any, batch: Any = 1) -> Any:
    """C[m, n] = A[m, k] @ B[k, n], `batch` times."""
    return 2 * batch * m * n * k


def attention_flops(pairs: Any, heads: int, head_dim: int, v_head_dim: int, backward: bool = False) -> Any:
    """pairs: sum over segments of q_len * kv_len, without the causal mask.

    Forward: q @ k^T and weights @ v. Backward (FlashAttention, Dao et al. 2022, algorithm 4): q @ k^T, grad @ v^T,
    weights^T @ grad, d_scores @ k and d_scores^T @ q; 2.5 times the forward when head_dim equals v_head_dim.
    """
    if backward:
        return 2 * pairs * heads * (3 * head_dim + 2 * v_head_dim)
    return 2 * pairs * heads * (head_dim + v_head_dim)


def conv_flops(out_numel: Any, in_channels: int, groups: int, kernel: Sequence[int]) -> Any:
    """One convolution pass (forward, gradient of the input, or gradient of the weight: all the same count)."""
    taps = 1
    for size in kernel:
        taps *= size
    return 2 * out_numel * (in_channels // groups) * taps
