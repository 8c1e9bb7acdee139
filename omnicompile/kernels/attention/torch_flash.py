"""Attention by torch's own flash kernel (anchors/attention_cuda.py)."""

from __future__ import annotations

from torch import Tensor

from omnicompile.anchors.attention_cuda import flash_attention, flash_attention_backward
from omnicompile.kernels.attention.call import Call
from omnicompile.kernels.registry import Functions


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    return flash_attention(q, k, v, call.cu_q, call.cu_k, call.causal, call.scale, call.window)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    static = call.cu_q, call.cu_k, call.causal, call.scale, call.window
    return *flash_attention_backward(grad, q, k, v, out, lse, *static), q.new_empty(0)


FUNCTIONS = Functions(forward, backward)
