"""`omnicompile::grouped_mm` and its weight's gradient: torch's grouped GEMM, and one product an expert.

forward(rows [r, k], weight, counts, transposed) -> [r, n], rows past sum(counts) zero; backward(rows, grad, counts,
transposed) -> the gradient of the weight. The gradient of the rows is the forward with the other `transposed`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from omnicompile.kernels.registry import Functions, Problem, hardware_of

_ALIGNMENT = 16  # bytes, of every row of an operand


def problem_of(rows: Tensor, weight: Sequence[int]) -> Problem:
    """What the registry is asked. weight: its shape, [experts, n, k] or [experts, k, n]."""
    return problem_on(hardware_of(rows.device), rows, weight)


def problem_on(hardware: str, rows: Tensor, weight: Sequence[int]) -> Problem:
    aligned = all(size * rows.element_size() % _ALIGNMENT == 0 for size in weight[1:])
    facts: frozenset[str] = frozenset() if aligned else frozenset({"unaligned"})
    # The number of rows is decided by the routing: it is no part of the problem.
    return Problem("grouped_mm", "rows", hardware, rows.dtype, tuple(map(int, weight)), facts=facts)


def _slices(counts: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, past-the-last row) of the experts that have rows."""
    bounds, start = [], 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            bounds.append((expert, start, start + count))
        start += count
    return bounds


def _each(rows: Tensor, weight: Tensor, counts: Tensor, transposed: bool) -> Tensor:
    out = rows.new_zeros(rows.shape[0], weight.shape[2] if transposed else weight.shape[1])
    for expert, start, end in _slices(counts):
        matrix = weight[expert] if transposed else weight[expert].t()
        out[start:end] = rows[start:end] @ matrix
    return out


def _each_weight(rows: Tensor, grad: Tensor, counts: Tensor, transposed: bool) -> Tensor:
    left, right = (rows, grad) if transposed else (grad, rows)
    out = rows.new_zeros(counts.shape[0], left.shape[1], right.shape[1])
    for expert, start, end in _slices(counts):
        out[expert] = left[start:end].t() @ right[start:end]
    return out


def _ends(counts: Tensor) -> Tensor:
    return counts.cumsum(0).to(torch.int32)


def _grouped(rows: Tensor, weight: Tensor, counts: Tensor, transposed: bool) -> Tensor:
    """Nothing here waits for the device. The kernel does not write rows past the last group."""
    ends = _ends(counts)
    if not rows.shape[0]:
        return rows.new_empty(0, weight.shape[2] if transposed else weight.shape[1])
    out = F.grouped_mm(rows.contiguous(), weight if transposed else weight.transpose(1, 2), offs=ends)
    inside = torch.arange(rows.shape[0], device=rows.device) < ends[-1]
    return torch.where(inside.unsqueeze(1), out, 0)


def _grouped_weight(rows: Tensor, grad: Tensor, counts: Tensor, transposed: bool) -> Tensor:
    """Experts without rows have a gradient of zero, whatever the kernel leaves there."""
    left, right = (rows, grad) if transposed else (grad, rows)
    if not rows.shape[0]:
        return rows.new_zeros(counts.shape[0], left.shape[1], right.shape[1])
    out = F.grouped_mm(left.contiguous().t(), right.contiguous(), offs=_ends(counts))
    return out.masked_fill_((counts == 0).view(-1, 1, 1), 0)


reference = Functions(_each, _each_weight)
torch_grouped = Functions(_grouped, _grouped_weight)
