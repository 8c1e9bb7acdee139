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


class _Cut(torch.autograd.Function):
    """Rows in parts of these sizes, which add up to all of them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        torch._check(sum(sizes) == rows.shape[0])
        return tuple(torch.split_with_sizes(rows, sizes))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return torch.cat(grads), None


def _inverse(order: Tensor) -> Tensor:
    return torch.argsort(order)


def _by_expert(arrived: Tensor, counts: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rows that arrived from `ranks` ranks, those of each by expert, sorted by expert, and the order that did it: none
    where there is one expert. counts [ranks, experts]: of rows."""
    ranks, experts = counts.shape
    if experts == 1:
        return arrived, None
    expert = torch.arange(experts, device=arrived.device).repeat(ranks)
    by_row = torch.repeat_interleave(expert, counts.reshape(-1), output_size=arrived.shape[0])
    order = torch.argsort(by_row, stable=True)
    return _Permute.apply(arrived, order, _inverse(order)), order


def as_arrived(rows: Tensor, order: Tensor | None) -> Tensor:
    """Rows sorted by expert in the order in which they arrived."""
    return rows if order is None else _Permute.apply(rows, _inverse(order), order)


def dispatch(
    x: Tensor, index: Tensor, experts: int, ranks: int, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, list[int], list[int]]:
    """Tokens [tokens, hidden] with chosen experts [tokens, top_k] -> rows of this rank's experts, sorted by expert.

    Returns rows [received, hidden], order [tokens * top_k] (as expert_dispatch), counts [experts / ranks], the order in
    which arrived rows were sorted (none where a rank holds one expert), and the numbers of rows sent to and received
    from each rank.
    """
    rows, order, counts = torch.ops.omnicompile.expert_dispatch(x, index, experts)
    mine = experts // ranks
    arriving = _send(counts, [mine] * ranks, [mine] * ranks, group)
    sent = counts.view(ranks, mine).sum(1).tolist()
    received = arriving.view(ranks, mine).sum(1).tolist()
    for size in [*sent, *received]:
        torch._check(size >= 0)
    arrived = _Exchange.apply(rows, received, sent, group)
    sorted_rows, sorting = _by_expert(arrived, arriving.view(ranks, mine))
    return sorted_rows, order, arriving.view(ranks, mine).sum(0), sorting, sent, received


def combine(
    rows: Tensor,
    order: Tensor,
    weight: Tensor,
    sorting: Tensor | None,
    sent: list[int],
    received: list[int],
    group: str,
) -> Tensor:
    """Results of this rank's experts [received, hidden] back to their tokens -> [tokens, hidden]."""
    home = _Exchange.apply(as_arrived(rows, sorting), sent, received, group)
    return torch.ops.omnicompile.expert_combine(home, order, weight)


Part = tuple[Tensor, Tensor, Tensor | None, list[int], list[int]]
"""Rows of a chunk's experts [received, hidden], counts [experts of the chunk], the order in which arrived rows were
sorted (none where the chunk is one expert), and the numbers of rows sent to and received from each rank."""


def chunked_dispatch(
    x: Tensor, index: Tensor, experts: int, ranks: int, chunks: int, group: str
) -> tuple[Tensor | Part, ...]:
    """`dispatch` with this rank's experts in `chunks` parts: order [tokens * top_k] and a `Part` for each.

    Rows are sorted by chunk, then rank, then expert: expert (rank r, chunk c, number j) counts as (c, r, j).
    """
    mine, part = experts // ranks, experts // ranks // chunks
    within = index % mine
    place = (within // part * ranks + index // mine) * part + within % part
    rows, order, counts = torch.ops.omnicompile.expert_dispatch(x, place, experts)
    counts = counts.view(chunks, ranks, part)
    arriving = _send(counts.transpose(0, 1).reshape(-1), [mine] * ranks, [mine] * ranks, group)
    arriving = arriving.view(ranks, chunks, part).transpose(0, 1)
    sizes = torch.stack([counts.sum(2), arriving.sum(2)]).flatten().tolist()
    for size in sizes:
        torch._check(size >= 0)
    by_rank = [sizes[i : i + ranks] for i in range(0, len(sizes), ranks)]
    sent, received = by_rank[:chunks], by_rank[chunks:]
    parts: list[Part] = []
    for number, own in enumerate(_Cut.apply(rows, [sum(to) for to in sent])):
        arrived = _Exchange.apply(own, received[number], sent[number], group)
        here = arriving[number]
        sorted_rows, sorting = _by_expert(arrived, here)
        parts.append((sorted_rows, here.sum(0), sorting, sent[number], received[number]))
    return order, *parts


def chunked_combine(order: Tensor, weight: Tensor, group: str, *parts: tuple[Tensor, list[int], list[int]]) -> Tensor:
    """`combine` of results in parts (results as rows arrived, sent, received)."""
    home = [_Exchange.apply(rows, sent, received, group) for rows, sent, received in parts]
    return torch.ops.omnicompile.expert_combine(torch.cat(home), order, weight)


def row_count(rows: Tensor) -> int:
    return rows.shape[0]
