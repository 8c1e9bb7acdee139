"""The attention operator against softmax written out, where a fused kernel computes it and where none does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omnicompile.anchors import attention as _attention  # noqa: F401  (defines the operator)
from omnicompile.anchors.attention_cpu import is_fused
from omnicompile.torch_compat import FakeTensorMode


def attend(q: Tensor, k: Tensor, v: Tensor, cu: Tensor | None, causal: bool, window: int, softcap: float) -> Tensor:
    """Output and gradients of q, k, v, for a cotangent that is the same in every call."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out, _ = torch.ops.omnicompile.attention(*leaves, cu, cu, None, 0, 0, causal, 0.3, window, softcap)
    seed = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
    return torch.cat([t.flatten() for t in (out, *torch.autograd.grad((out * seed).sum(), leaves))])


def written_out(q: Tensor, k: Tensor, v: Tensor, cu: Tensor | None, causal: bool, window: int) -> Tensor:
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    groups = q.shape[1] // k.shape[1]
    keys, values = (t.repeat_interleave(groups, 1) for t in leaves[1:])
    row, col = torch.arange(q.shape[2]).view(-1, 1) + k.shape[2] - q.shape[2], torch.arange(k.shape[2])
    hidden = torch.zeros(q.shape[2], k.shape[2], dtype=torch.bool)
    if causal:
        hidden |= col > row
    if window:
        hidden |= (col <= row - window) | (col >= row + window)
    if cu is not None:
        number = torch.bucketize(col, cu[1:], right=True)
        hidden |= number.view(-1, 1) != number
    scores = (leaves[0] @ keys.transpose(2, 3) * 0.3).masked_fill(hidden, float("-inf"))
    out = scores.softmax(-1) @ values
    seed = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
    return torch.cat([t.flatten() for t in (out, *torch.autograd.grad((out * seed).sum(), leaves))])


def inputs(queries: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, queries, 4, 16, generator=generator, dtype=torch.float64).transpose(1, 2)
    k, v = torch.randn(2, 1, kv_heads, 48, 16, generator=generator, dtype=torch.float64)
    return q, k, v


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize(
    "queries, kv_heads, cu", [(48, 4, None), (48, 2, None), (20, 2, None), (48, 2, [0, 7, 30, 48])]
)
def test_fused_kernel(queries: int, kv_heads: int, cu: list[int] | None, causal: bool, window: int) -> None:
    q, k, v = inputs(queries, kv_heads)
    assert is_fused(q, k, v, None, 0.0)
    bounds = None if cu is None else torch.tensor(cu, dtype=torch.int32)
    got = attend(q, k, v, bounds, causal, window, 0.0)
    torch.testing.assert_close(got, written_out(q, k, v, bounds, causal, window), rtol=1e-10, atol=1e-12)


def test_a_soft_cap_has_no_fused_kernel() -> None:
    q, k, v = inputs(48, 2)
    assert not is_fused(q, k, v, None, 50.0)
    got = attend(q, k, v, None, True, 0, 1e6)  # so high that it does nothing
    torch.testing.assert_close(got, written_out(q, k, v, None, True, 0), rtol=1e-6, atol=1e-8)


def test_results_are_laid_out_as_traced() -> None:
    q, k, v = inputs(48, 2)
    out, lse = torch.ops.omnicompile.attention(q, k, v, None, None, None, 0, 0, True, 0.3, 0, 0.0)
    arguments = (out, q, k, v, out, lse, None, None, None, 0, 0, True, 0.3, 0, 0.0)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments]
        traced = torch.ops.omnicompile.attention_backward(*fakes)
    for real, fake in zip(torch.ops.omnicompile.attention_backward(*arguments), traced):
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)
