"""`omnicompile::attention`: one operator for dense, packed, windowed and cross attention.

Layout: q [batch, heads, q_len, head_dim], k [batch, kv_heads, kv_len, head_dim], v [batch, kv_heads, kv_len,
v_head_dim]; heads is a multiple of kv_heads. With `cu_q`/`cu_k` (int tensors of segment boundaries, the cu_seqlens of
flash-attention) the batch is 1 and attention stays within segments. `window` > 0 limits each query to the `window` keys
up to and including its own position (sliding window); 0 means no limit. `softcap` > 0 caps scores by tanh. `sinks`
[heads] adds one learned score per head to the softmax's denominator.

Returns the output [batch, heads, q_len, v_head_dim] and the log-sum-exp of the scores [batch, heads, q_len] in float32
(float64 for float64 inputs), which the backward reads instead of the attention matrix.

`implementation` is one of the kernels (omnicompile/kernels); "" takes the first one that computes this here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from omnicompile.kernels.attention.call import Call, problem_of
from omnicompile.kernels.attention.reference import accumulate_dtype
from omnicompile.kernels.registry import Functions
from omnicompile.kernels.table import default_kernel, functions_of


def _functions(kernel: str, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Functions:
    return functions_of("attention", kernel or default_kernel(problem_of(q, k, v, call)).name)


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
    implementation: str = "",
) -> tuple[Tensor, Tensor]:
    call = Call(cu_q, cu_k, sinks, causal, scale, window, softcap)
    out, lse = _functions(implementation, q, k, v, call).forward(q, k, v, call)
    return _laid_out(out), lse.contiguous()


@attention.register_fake
def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_output(q, v), q.new_empty(q.shape[:3], dtype=accumulate_dtype(q))


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
    implementation: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the sinks (an empty tensor when there are none)."""
    call = Call(cu_q, cu_k, sinks, causal, scale, window, softcap)
    dq, dk, dv, d_sinks = _functions(implementation, q, k, v, call).backward(grad, q, k, v, out, lse, call)
    return _laid_out(dq), _laid_out(dk), _laid_out(dv), d_sinks


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
