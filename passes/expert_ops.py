"""Expert parallelism at run time: rows travel to the ranks that hold their experts, and back.

Written with plain operators and `_c10d_functional`, so that make_fx and Dynamo trace through them. The number of rows
that arrive depends on the routing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from omnicompile.anchors import experts as _experts  # noqa: F401  (defines the operators)

_c10d = torch.ops._c10d_functional


def _send(x: Tensor, out_splits: list[int], in_splits: list[int], group: str) -> Tensor:
    return _c10d.wait_tensor(_c10d.all_to_all_single(x.contiguous(), out_splits, in_splits, group))


class _Exchange(torch.autograd.Function):
    """Rows to their ranks; the backward sends gradients the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, out_splits: list[int], in_splits: list[int], group: str) -> Tensor:
        ctx.where = (in_splits, out_splits, group)
        return _send(rows, out_splits, in_splits, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _send(grad, *ctx.where), None, None, None


class _Permute(torch.autograd.Function):
    """rows[order] for a permutation `order` with inverse `inverse`: its gradient is a permutation too."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def _inverse(order: Tensor) -> Tensor:
    return torch.argsort(order)


def dispatch(
    x: Tensor, index: Tensor, experts: int, ranks: int, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int], list[int]]:
    """Tokens [tokens, hidden] with chosen experts [tokens, top_k] -> rows of this rank's experts, sorted by expert.

    Returns rows [received, hidden], order [tokens * top_k] (as expert_dispatch), counts [experts / ranks], the order in
    which arrived rows were sorted, and the numbers of rows sent to and received from each rank.
    """
    rows, order, counts = torch.ops.omnicompile.expert_dispatch(x, index, experts)
    mine = experts // ranks
    arriving = _send(counts, [mine] * ranks, [mine] * ranks, group)
    sent = counts.view(ranks, mine).sum(1).tolist()
    received = arriving.view(ranks, mine).sum(1).tolist()
    for size in [*sent, *received]:
        torch._check(size >= 0)
    arrived = _Exchange.apply(rows, received, sent, group)
    expert = torch.arange(mine, device=x.device).repeat(ranks)
    by_row = torch.repeat_interleave(expert, arriving, output_size=arrived.shape[0])
    sorting = torch.argsort(by_row, stable=True)
    sorted_rows = _Permute.apply(arrived, sorting, _inverse(sorting))
    return sorted_rows, order, arriving.view(ranks, mine).sum(0), sorting, sent, received


def combine(
    rows: Tensor, order: Tensor, weight: Tensor, sorting: Tensor, sent: list[int], received: list[int], group: str
) -> Tensor:
    """Results of this rank's experts [received, hidden] back to their tokens -> [tokens, hidden]."""
    unsorted = _Permute.apply(rows, _inverse(sorting), sorting)
    home = _Exchange.apply(unsorted, sent, received, group)
    return torch.ops.omnicompile.expert_combine(home, order, weight)


def row_count(rows: Tensor) -> int:
    return rows.shape[0]
