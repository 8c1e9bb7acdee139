"""Seconds of single kernels from their shapes: roofline with tile and wave quantization.

Formulas and the sources of their constants are in docs/cost_model.md. All functions take floats (mean values are fine),
return seconds, return 0.0 where there is no work, and otherwise at least the kernel launch floor.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from math import ceil, log2

from omnicompile.cost_model.hardware import Hardware

_SPLITS = (1, 2, 4)
_QUERY_BLOCK = 128
_BYTES = {"float64": 8, "float32": 4, "tfloat32": 4, "float8": 1}


def gemm_seconds(m: float, n: float, k: float, batch: float, dtype: str, hw: Hardware) -> float:
    """`batch` products (m, k) x (k, n), operands and result in `dtype`, 2*m*n*k*batch FLOPs."""
    if m <= 0 or n <= 0 or k <= 0 or batch <= 0:
        return 0.0
    key = hw.dtype_key(dtype)
    width = _BYTES.get(key, 2)
    bandwidth = hw.memory_bandwidth * hw.memory_fraction
    reading = batch * width * k * (m + n) / bandwidth
    writing = batch * max(width, 2) * m * n / bandwidth
    seconds = _tiles_seconds(m, n, k, batch, key, hw)
    seconds += hw.gemm.store_fraction * writing + hw.gemm.load_fraction * reading
    return max(seconds, reading + writing, hw.kernel_launch_seconds) + hw.kernel_overhead_seconds


def grouped_gemm_seconds(
    tokens_per_expert: float, n: float, k: float, experts: float, dtype: str, hw: Hardware
) -> float:
    """`experts` products (tokens_per_expert, k) x (k, n) in one kernel, balanced; for the weight gradient too."""
    if tokens_per_expert <= 0:
        return 0.0
    loss = 1.0 + hw.gemm.grouped_tokens / tokens_per_expert if experts > 1 else 1.0
    return loss * gemm_seconds(tokens_per_expert, n, k, experts, dtype, hw)


def attention_seconds(
    heads: float,
    kv_heads: float,
    head_dim: float,
    v_head_dim: float,
    pairs: float,
    q_tokens: float,
    kv_tokens: float,
    causal: bool,
    backward: bool,
    dtype: str,
    hw: Hardware,
) -> float:
    """One fused (FlashAttention-like) varlen attention over packed segments.

    heads, kv_heads: on this rank. pairs: sum over segments of q_len*kv_len, NOT halved for a causal mask. q_tokens,
    kv_tokens: sums of the lengths. The mean segment length is pairs / q_tokens. A causal mask halves the work (plus
    what masked parts of the diagonal blocks cost). The backward recomputes the scores: 5 products for the forward's 2.
    """
    if pairs <= 0 or heads <= 0 or q_tokens <= 0:
        return 0.0
    constants = hw.attention_at(dtype)
    if backward:
        flops = 2.0 * pairs * heads * (3.0 * head_dim + 2.0 * v_head_dim)
        fraction, half_length = constants.backward_fraction, constants.backward_length
    else:
        flops = 2.0 * pairs * heads * (head_dim + v_head_dim)
        fraction, half_length = constants.forward_fraction, constants.forward_length
    length = pairs / q_tokens
    ramp = 1.0 + (half_length / length) ** constants.ramp_power
    if causal:
        flops *= 0.5 * (1.0 + min(1.0, constants.causal_block / length))
        ramp += constants.causal_length / length
    blocks = heads * max(1.0, min(q_tokens, constants.measured_elements / (heads * head_dim)) / _QUERY_BLOCK)
    rate = hw.peak(dtype) * hw.sustained_fraction * _interpolate(fraction, head_dim)
    seconds = flops / rate * ramp * (1.0 + constants.wave_overhead * hw.sm_count / blocks)
    width = _BYTES.get(hw.dtype_key(dtype), 2)
    nbytes = width * (heads * q_tokens + kv_heads * kv_tokens) * (head_dim + v_head_dim) * (2.0 if backward else 1.0)
    memory = nbytes / (hw.memory_bandwidth * hw.memory_fraction)
    return max(seconds, memory, hw.kernel_launch_seconds) + hw.kernel_overhead_seconds


def unfused_attention_seconds(
    heads: float,
    head_dim: float,
    v_head_dim: float,
    pairs: float,
    q_tokens: float,
    backward: bool,
    dtype: str,
    hw: Hardware,
) -> float:
    """Attention as batched GEMMs with the scores in memory, all pairs computed whatever the mask.

    Forward: scores, softmax (read, write), dropout (read, write, a byte of mask), product with the values. Backward:
    four GEMMs and the gradients of dropout and softmax. Segments of equal length pairs / q_tokens.
    """
    if pairs <= 0 or heads <= 0 or q_tokens <= 0:
        return 0.0
    length = pairs / q_tokens
    batch = heads * q_tokens / length
    scores = gemm_seconds(length, length, head_dim, batch, dtype, hw)
    values = gemm_seconds(length, v_head_dim, length, batch, dtype, hw)
    width = _BYTES.get(hw.dtype_key(dtype), 2)
    elements = heads * pairs
    if backward:
        return 2.0 * (scores + values) + memory_seconds((5.0 * width + 1.0) * elements, hw)
    return scores + values + memory_seconds((4.0 * width + 1.0) * elements, hw)


def memory_seconds(nbytes: float, hw: Hardware) -> float:
    """A memory-bound kernel that reads and writes `nbytes` in all."""
    if nbytes <= 0:
        return 0.0
    seconds = nbytes / (hw.memory_bandwidth * hw.memory_fraction)
    return max(seconds, hw.kernel_launch_seconds) + hw.kernel_overhead_seconds


@cache
def _halvings(tiles: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int, float], ...]:
    """(rows, columns, halvings of the largest tile) of each tile."""
    largest = max(m * n for m, n in tiles)
    return tuple((m, n, log2(largest / (m * n))) for m, n in tiles)


def _tiles_seconds(m: float, n: float, k: float, batch: float, key: str, hw: Hardware) -> float:
    """Best over tile sizes and splits of the reduction dim of: whole waves of tiles, one tile per SM."""
    constants = hw.gemm
    sms = hw.sm_count
    merge = 8.0 * m * n * batch / (hw.memory_bandwidth * hw.memory_fraction)
    rate = hw.peak_flops[key] * constants.max_fraction[key] * hw.sustained_fraction / sms
    best = float("inf")
    for tile_m, tile_n, halvings in _halvings(constants.tiles):
        tiles = ceil(m / tile_m) * ceil(n / tile_n) * batch
        work = tile_m * tile_n / constants.small_tile_fraction**halvings
        for split in _SPLITS:
            units = ceil(tiles * split / sms) * work * (k / split)
            seconds = 2.0 * units / rate
            if split > 1:
                seconds += merge * split
            best = min(best, seconds)
            if tiles >= 4 * sms:
                break
    return best


def _interpolate(table: Mapping[int, float], x: float) -> float:
    """Piecewise linear through the table's points (sorted by key), constant beyond its ends."""
    low_x, low = 0, 0.0
    for point, value in table.items():
        if x <= point:
            return value if not low_x else low + (value - low) * (x - low_x) / (point - low_x)
        low_x, low = point, value
    return low
