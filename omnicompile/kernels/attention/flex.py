"""Attention by torch's flex attention: masks by segment, window and cause, and soft caps, in one kernel.

On GPUs it is compiled. The backward runs the forward again under autograd, since flex attention gives no backward of
its own to call. Masks are made by torch.func, so that both need autograd beneath the operator that calls them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from omnicompile.kernels.attention.call import Call
from omnicompile.kernels.registry import Functions
from omnicompile.torch_compat import with_autograd


@cache
def _compiled() -> Callable[..., Any]:
    function: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
    return function


def _segment_of(cu: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """For each position its segment, and its place in it. Positions behind the last bound have the segment -1."""
    places = torch.arange(length, device=cu.device)
    segment = torch.searchsorted(cu.to(torch.int64), places, right=True) - 1
    starts = cu.to(torch.int64)[segment.clamp(max=cu.shape[0] - 1)]
    return torch.where(places < cu[-1], segment, -1), places - starts


def _mask(q: Tensor, k: Tensor, call: Call) -> BlockMask | None:
    q_len, kv_len, device = q.shape[2], k.shape[2], q.device
    if not call.packed and not call.causal and call.window <= 0:
        return None
    cu_q = call.cu_q if call.cu_q is not None else torch.tensor([0, q_len], device=device)
    cu_k = call.cu_k if call.cu_k is not None else torch.tensor([0, kv_len], device=device)
    (q_segment, q_place), (k_segment, k_place) = _segment_of(cu_q, q_len), _segment_of(cu_k, kv_len)
    lengths = (cu_k.diff() - cu_q.diff()).to(torch.int64)
    shift = lengths[q_segment.clamp(0, lengths.shape[0] - 1)]  # the last query is aligned with the last key
    row, causal, window = q_place + shift, call.causal, call.window

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        allowed = (q_segment[i] == k_segment[j]) & (q_segment[i] >= 0)
        if causal:
            allowed = allowed & (k_place[j] <= row[i])
        if window > 0:
            allowed = allowed & (k_place[j] > row[i] - window)
            if not causal:
                allowed = allowed & (k_place[j] < row[i] + window)
        return allowed

    return create_block_mask(seen, None, None, q_len, kv_len, device=device)


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    with with_autograd(), torch.no_grad():
        return _attend(q, k, v, call)


def _attend(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    run = _compiled() if q.is_cuda else flex_attention
    cap = call.softcap

    def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    out, aux = run(
        q, k, v, score_mod=capped if cap > 0 else None, block_mask=_mask(q, k, call), scale=call.scale,
        enable_gqa=q.shape[1] != k.shape[1], return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    lse = aux.lse
    if call.cu_q is not None:  # rows that see nothing
        inside = torch.arange(q.shape[2], device=q.device) < call.cu_q[-1]
        out, lse = torch.where(inside.view(1, 1, -1, 1), out, 0), torch.where(inside, lse, 0)
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with with_autograd():
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        again, _ = _attend(leaves[0], leaves[1], leaves[2], call)
        dq, dk, dv = torch.autograd.grad(again, leaves, grad)
    return dq, dk, dv, q.new_empty(0)


FUNCTIONS = Functions(forward, backward)
