"""Attention by torch's flash kernel: against the plain operator on a GPU; on CPUs, that the kernel is called as its
schema and its shapes say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omnicompile.anchors import attention as _attention  # noqa: F401  (defines the operator)
from omnicompile.anchors.attention_cuda import flash_attention, flash_attention_backward, is_flash

CASES = [(48, 4, None), (48, 2, None), (20, 2, None), (48, 2, [0, 7, 30, 48])]


def tensors(queries: int, kv_heads: int, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q, grad = torch.randn(2, 1, queries, 4, 32, generator=generator).transpose(2, 3)
    k, v = torch.randn(2, 1, 48, kv_heads, 32, generator=generator).transpose(2, 3)
    return tuple(t.to(device, dtype) for t in (grad, q, k, v))


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("queries, kv_heads, cu", CASES)
def test_shapes(queries: int, kv_heads: int, cu: list[int] | None, window: int) -> None:
    grad, q, k, v = tensors(queries, kv_heads, "meta", torch.bfloat16)
    bounds = None if cu is None else torch.tensor(cu, device="meta")
    out, lse = flash_attention(q, k, v, bounds, bounds, True, 0.3, window)
    assert out.shape == q.shape and lse.shape == q.shape[:3] and lse.dtype is torch.float32
    grads = flash_attention_backward(grad, q, k, v, out, lse, bounds, bounds, True, 0.3, window)
    assert [g.shape for g in grads] == [t.shape for t in (q, k, v)]


def test_only_on_gpus() -> None:
    _, q, k, v = tensors(48, 2, "cpu", torch.bfloat16)
    assert not is_flash(q, k, v, None, 0.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("queries, kv_heads, cu", CASES)
def test_equals_the_plain_operator(
    queries: int, kv_heads: int, cu: list[int] | None, causal: bool, window: int
) -> None:
    """In bfloat16 on the GPU within its rounding of float64 on the CPU."""
    grad, q, k, v = tensors(queries, kv_heads, "cuda", torch.bfloat16)
    assert is_flash(q, k, v, None, 0.0)

    def run(device: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(device, dtype).requires_grad_() for t in (q, k, v)]
        bounds = None if cu is None else torch.tensor(cu, dtype=torch.int32, device=device)
        out, lse = torch.ops.omnicompile.attention(*leaves, bounds, bounds, None, 0, 0, causal, 0.3, window, 0.0)
        found = [out, lse, *torch.autograd.grad(out, leaves, grad.to(device, dtype))]
        return [t.detach().double().cpu() for t in found]

    for got, want in zip(run("cuda", torch.bfloat16), run("cpu", torch.float64), strict=True):
        assert (got - want).norm() <= 2e-2 * want.norm()
