"""Kernel times: monotonic, above the roofline, and near published points."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnicompile.cost_model.hardware import Hardware, known_hardware, load_hardware
from omnicompile.cost_model.kernels import attention_seconds, gemm_seconds, grouped_gemm_seconds, memory_seconds

SIZES = st.sampled_from([1, 64, 100, 128, 576, 1024, 1536, 4096, 8192, 28672])
NAMES = st.sampled_from(known_hardware())


def benchmark(name: str) -> Hardware:
    """A machine at the clocks of a short kernel benchmark."""
    return replace(load_hardware(name), sustained_fraction=1.0)


def teraflops(flops: float, seconds: float) -> float:
    return flops / seconds / 1e12


@settings(max_examples=200, deadline=None)
@given(NAMES, SIZES, SIZES, SIZES, st.sampled_from([1, 8]))
def test_gemm_is_above_the_roofline_and_grows(name: str, m: int, n: int, k: int, batch: int) -> None:
    hw = load_hardware(name)
    seconds = gemm_seconds(m, n, k, batch, "bfloat16", hw)
    assert seconds >= 2 * m * n * k * batch / hw.peak("bfloat16")
    assert seconds >= 2 * batch * (m * k + k * n + m * n) / hw.memory_bandwidth
    assert seconds >= hw.kernel_launch_seconds
    for bigger in ((2 * m, n, k), (m, 2 * n, k), (m, n, 2 * k)):
        assert gemm_seconds(*bigger, batch, "bfloat16", hw) >= seconds


@pytest.mark.parametrize(
    ("name", "dtype", "m", "n", "k", "published", "tolerance"),
    [
        ("a100", "float16", 8192, 12288, 4096, 241.6, 0.10),  # EleutherAI cookbook
        ("a100", "float16", 8192, 51200, 4096, 255.4, 0.10),
        ("h800", "float8", 4096, 7168, 16384, 1358, 0.10),  # DeepGEMM
        ("h800", "float8", 4096, 32768, 512, 590, 0.20),
        ("h800", "float8", 64, 7168, 16384, 336, 0.15),
    ],
)
def test_gemm_near_published(name: str, dtype: str, m: int, n: int, k: int, published: float, tolerance: float) -> None:
    rate = teraflops(2 * m * n * k, gemm_seconds(m, n, k, 1, dtype, benchmark(name)))
    assert rate == pytest.approx(published, rel=tolerance)


def test_wave_quantization() -> None:
    """On 108 SMs, 4096 x 1024 takes as long as 4096 x 1536: two waves of 256x128 tiles."""
    hw = benchmark("a100")
    narrow = 2 * 4096 * 4096 * 1024 / gemm_seconds(4096, 1024, 4096, 1, "bf16", hw)
    wide = 2 * 4096 * 4096 * 1536 / gemm_seconds(4096, 1536, 4096, 1, "bf16", hw)
    assert 0.5 < narrow / wide < 0.85  # measured: 142.8 and 244.2 TFLOP/s (SimuMax)


def test_grouped_gemm() -> None:
    hw = load_hardware("h100")
    dense = gemm_seconds(16384, 4096, 4096, 1, "bf16", hw)
    few, many = (grouped_gemm_seconds(16384 / e, 4096, 4096, e, "bf16", hw) for e in (64, 4))
    assert dense < many < few
    assert grouped_gemm_seconds(16384, 4096, 4096, 1, "bf16", hw) == dense
    rate = teraflops(2 * 8 * 4096 * 4096 * 7168, grouped_gemm_seconds(4096, 4096, 7168, 8, "fp8", benchmark("h800")))
    assert rate == pytest.approx(1288, rel=0.1)  # DeepGEMM
    assert grouped_gemm_seconds(0, 4096, 4096, 8, "bf16", hw) == 0


def flash_rate(hw: Hardware, length: int, head_dim: int, causal: bool, both: bool) -> float:
    """TFLOP/s in the papers' protocol: 16k tokens, hidden size 2048, causal FLOPs halved, backward 2.5x forward."""
    shape = (2048 / head_dim, 2048 / head_dim, head_dim, head_dim, 16384 * length, 16384, 16384, causal)
    seconds = attention_seconds(*shape, False, "bf16", hw)
    if both:
        seconds += attention_seconds(*shape, True, "bf16", hw)
    return teraflops(4 * 16384 * length * 2048 * (0.5 if causal else 1) * (3.5 if both else 1), seconds)


@pytest.mark.parametrize(
    ("name", "kernel", "length", "head_dim", "causal", "both", "published"),
    [
        ("a100", "fa2", 2048, 128, True, True, 155),
        ("a100", "fa2", 16384, 64, False, True, 176),
        ("h100", "fa2", 16384, 128, True, True, 328),
        ("h100", "fa2", 1024, 64, True, True, 192),
        ("h100", "fa3", 16384, 128, True, False, 616),
        ("h100", "fa3", 2048, 128, False, False, 625),
        ("h100", "fa3", 1024, 64, True, False, 265),
    ],
)
def test_attention_near_published(
    name: str, kernel: str, length: int, head_dim: int, causal: bool, both: bool, published: float
) -> None:
    hw = benchmark(name).with_attention_kernel(kernel)
    assert flash_rate(hw, length, head_dim, causal, both) == pytest.approx(published, rel=0.1)


def test_attention_shapes() -> None:
    hw = load_hardware("h100")

    def seconds(heads: float = 16, pairs: float = 8192.0**2, causal: bool = True, backward: bool = False) -> float:
        return attention_seconds(heads, 4, 128, 128, pairs, 8192, 8192, causal, backward, "bf16", hw)

    assert seconds(heads=32) > seconds() > seconds(heads=8)
    assert seconds(backward=True) > 2 * seconds()
    assert seconds() < seconds(causal=False) < 2 * seconds()
    assert seconds(pairs=8192.0 * 1024) < seconds() / 4  # packed segments of 1024
    assert seconds(pairs=0) == 0


def test_attention_longer_than_measured_runs_hardly_faster() -> None:
    """FlashAttention-3's forward levels off at 646 to 648 TFLOP/s from 8K to 16K tokens (head dim 128, no mask)."""
    hw = benchmark("h100").with_attention_kernel("fa3")

    def rate(length: float, heads: int) -> float:
        pairs = length * length
        return 4.0 * pairs * heads * 128 / attention_seconds(
            heads, heads, 128, 128, pairs, length, length, False, False, "bf16", hw
        )  # fmt: skip

    assert rate(16_384, 16) == pytest.approx(648e12, rel=0.05)
    assert rate(196_608, 28) == pytest.approx(648e12, rel=0.05)


def test_memory() -> None:
    hw = load_hardware("h100")
    assert memory_seconds(0, hw) == 0
    assert memory_seconds(10, hw) == hw.kernel_launch_seconds
    assert memory_seconds(1e9, hw) == pytest.approx(1e9 / (hw.memory_bandwidth * hw.memory_fraction))
