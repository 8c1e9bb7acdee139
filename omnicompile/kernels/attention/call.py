"""One call of the attention operator, and the layouts that flash kernels take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omnicompile.kernels.registry import Problem, hardware_of


@dataclass(frozen=True)
class Call:
    """Arguments of `omnicompile::attention` but for q, k, v. Meanings as there."""

    cu_q: Tensor | None
    cu_k: Tensor | None
    sinks: Tensor | None
    causal: bool
    scale: float
    window: int
    softcap: float

    @property
    def packed(self) -> bool:
        return self.cu_q is not None and self.cu_k is not None

    def bounds(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Segment bounds as int32. Without segments, those of the rows of the batch."""
        if self.cu_q is not None and self.cu_k is not None:
            return self.cu_q.to(torch.int32), self.cu_k.to(torch.int32)
        lengths = ((t.shape[0] * t.shape[2], t.shape[2]) for t in (q, k))
        first, second = (
            torch.arange(0, whole + 1, each, dtype=torch.int32, device=q.device) for whole, each in lengths
        )
        return first, second

    def sides(self) -> tuple[int, int]:
        """Keys that a query sees before and after its own, -1 for all."""
        left = self.window - 1 if self.window > 0 else -1
        return left, 0 if self.causal else left


def problem_of(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Problem:
    """What the registry is asked. Works on fake tensors too; the hardware is that of `q`'s device."""
    return problem_on(hardware_of(q.device), q, k, v, call)


def problem_on(hardware: str, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Problem:
    facts = set()
    if call.softcap > 0:
        facts.add("softcap")
    if call.sinks is not None:
        facts.add("sinks")
    if not q.shape[-1] == k.shape[-1] == v.shape[-1]:
        facts.add("unequal_heads")
    if not q.dtype == k.dtype == v.dtype:
        facts.add("mixed_dtypes")
    variant = "windowed" if call.window > 0 else "packed" if call.packed else "dense"
    shape = (*q.shape[:3], *k.shape[1:3], v.shape[3], int(call.causal), int(call.packed), call.window)
    return Problem("attention", variant, hardware, q.dtype, tuple(map(int, shape)), q.shape[-1], frozenset(facts))


def rows(x: Tensor, packed: bool) -> Tensor:
    """[batch, heads, len, d] as flash kernels take it: [batch, len, heads, d], of packed segments [len, heads, d]."""
    x = x.transpose(1, 2)
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.squeeze(0) if packed else x


def heads(x: Tensor, packed: bool) -> Tensor:
    """The other way round."""
    return (x.unsqueeze(0) if packed else x).transpose(1, 2)


def in_segments(x: Tensor, cu: Tensor | None) -> Tensor:
    """Rows [len, heads, d] behind the last segment become zero; kernels do not write them."""
    if cu is None:
        return x
    return torch.where((torch.arange(x.shape[0], device=x.device) < cu[-1]).view(-1, 1, 1), x, 0)
