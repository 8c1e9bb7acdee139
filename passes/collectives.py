"""The collectives that passes put into a graph, each with its backward under the gradient convention.

Plain functions over `_c10d_functional`, so that make_fx and Dynamo trace through them. `group` is a process group name,
`ranks` its size, `rank` a 0-d int64 tensor with this rank's place in it (data, so that one graph serves every rank).

| forward                       | cotangent in -> out     | backward                |
|-------------------------------|-------------------------|-------------------------|
| all_gather: Shard -> Replicate| Partial -> Shard        | reduce-scatter          |
| local_slice: Replicate -> Shard| Shard -> Partial       | zero padding            |
| all_to_all: Shard -> Shard    | Shard -> Shard          | all-to-all the other way|
| all_reduce: Partial -> Replicate| Partial -> Replicate  | all-reduce              |
| reduce_scatter: Partial -> Shard| Shard -> Replicate    | all-gather              |
| share: Replicate -> Partial   | Replicate -> Partial    | the same scaling        |
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_c10d = torch.ops._c10d_functional


def _gather_rows(x: Tensor, ranks: int, group: str) -> Tensor:
    return _c10d.wait_tensor(_c10d.all_gather_into_tensor(x.contiguous(), ranks, group))


def _scatter_rows(x: Tensor, ranks: int, group: str) -> Tensor:
    return _c10d.wait_tensor(_c10d.reduce_scatter_tensor(x.contiguous(), "sum", ranks, group))


def _reduce(x: Tensor, group: str) -> Tensor:
    return _c10d.wait_tensor(_c10d.all_reduce(x.contiguous(), "sum", group))


def _exchange(x: Tensor, ranks: int, group: str) -> Tensor:
    """x [ranks * n, ...]: block i goes to rank i, block j of the result came from rank j."""
    splits = [x.shape[0] // ranks] * ranks
    return _c10d.wait_tensor(_c10d.all_to_all_single(x.contiguous(), splits, splits, group))


def _fold(x: Tensor, dim: int, outer: int) -> Tensor:
    """[.., outer * rest, ..] -> [.., outer, rest, ..]"""
    return x.unflatten(dim, (outer, x.shape[dim] // outer)) if outer > 1 else x


def _unfold(x: Tensor, dim: int, outer: int) -> Tensor:
    return x.flatten(dim, dim + 1) if outer > 1 else x


def _gather(x: Tensor, dim: int, outer: int, ranks: int, group: str) -> Tensor:
    x = _fold(x, dim, outer)
    cut = dim + (outer > 1)
    rows = _gather_rows(x.movedim(cut, 0), ranks, group)
    return _unfold(rows.movedim(0, cut), dim, outer).contiguous()


def _scatter(x: Tensor, dim: int, outer: int, ranks: int, group: str) -> Tensor:
    x = _fold(x, dim, outer)
    cut = dim + (outer > 1)
    rows = _scatter_rows(x.movedim(cut, 0), ranks, group)
    return _unfold(rows.movedim(0, cut), dim, outer).contiguous()


def _swap(x: Tensor, split: int, split_outer: int, join: int, join_outer: int, ranks: int, group: str) -> Tensor:
    """Cut dimension `split`, put dimension `join` together."""
    parts = _fold(x, split, split_outer)
    at = split + (split_outer > 1)
    parts = parts.unflatten(at, (ranks, parts.shape[at] // ranks)).movedim(at, 0)
    parts = _unfold(parts, split + 1, split_outer)
    received = _exchange(parts.flatten(0, 1), ranks, group).unflatten(0, (ranks, parts.shape[1]))
    received = _fold(received, join + 1, join_outer)
    at = join + (join_outer > 1)
    whole = received.movedim(0, at).flatten(at, at + 1)
    return _unfold(whole, join, join_outer).contiguous()


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *where: Any) -> Tensor:
        ctx.where = where
        return _gather(x, *where)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _scatter(grad, *ctx.where), None, None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *where: Any) -> Tensor:
        ctx.where = where
        return _scatter(x, *where)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _gather(grad, *ctx.where), None, None, None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *where: Any) -> Tensor:
        ctx.where = where
        return _swap(x, *where)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        split, split_outer, join, join_outer, ranks, group = ctx.where
        back = _swap(grad, join, join_outer, split, split_outer, ranks, group)
        return back, None, None, None, None, None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return _reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _reduce(grad, ctx.group), None


def all_gather(x: Tensor, dim: int, outer: int, ranks: int, group: str) -> Tensor:
    """Shard(dim, outer) -> Replicate."""
    return _AllGather.apply(x, dim, outer, ranks, group)


def reduce_scatter(x: Tensor, dim: int, outer: int, ranks: int, group: str) -> Tensor:
    """Partial -> Shard(dim, outer)."""
    return _ReduceScatter.apply(x, dim, outer, ranks, group)


def all_to_all(x: Tensor, split: int, split_outer: int, join: int, join_outer: int, ranks: int, group: str) -> Tensor:
    """Shard(join, join_outer) -> Shard(split, split_outer)."""
    return _AllToAll.apply(x, split, split_outer, join, join_outer, ranks, group)


def all_reduce(x: Tensor, group: str) -> Tensor:
    """Partial -> Replicate."""
    return _AllReduce.apply(x, group)


def local_slice(x: Tensor, dim: int, outer: int, ranks: int, rank: Tensor) -> Tensor:
    """Replicate -> Shard(dim, outer). No communication."""
    folded = _fold(x, dim, outer)
    cut = dim + (outer > 1)
    size = folded.shape[cut] // ranks
    index = rank * size + torch.arange(size, device=x.device)
    return _unfold(folded.index_select(cut, index), dim, outer)


def share(x: Tensor, ranks: int) -> Tensor:
    """Replicate -> Partial: every rank keeps an equal share."""
    return x / ranks


def join_heads(ranks: int, *parts: Tensor) -> Tensor:
    """Groups of heads [batch, ranks * heads, ...], each with those of all ranks -> [batch, ranks * groups * heads,
    ...], those of a rank together. No communication."""
    return torch.cat([part.unflatten(1, (ranks, part.shape[1] // ranks)) for part in parts], 2).flatten(1, 2)


class _GatherParam(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        shard: Tensor,
        dim: int,
        size: int,
        dtype: torch.dtype,
        reduce: torch.dtype | None,
        ranks: int,
        group: str,
    ) -> Tensor:
        ctx.where = (dim, shard.shape[dim], shard.dtype, reduce, ranks, group)
        whole = _gather(shard.to(dtype), dim, 1, ranks, group)
        return whole.narrow(dim, 0, size).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        dim, chunk, dtype, reduce, ranks, group = ctx.where
        grad = grad.to(reduce or grad.dtype)
        missing = chunk * ranks - grad.shape[dim]
        if missing:
            shape = list(grad.shape)
            shape[dim] = missing
            grad = torch.cat([grad, grad.new_zeros(shape)], dim)
        return _scatter(grad, dim, 1, ranks, group).to(dtype), None, None, None, None, None, None


def gather_param(
    shard: Tensor, dim: int, size: int, dtype: torch.dtype, reduce: torch.dtype | None, ranks: int, group: str
) -> Tensor:
    """The whole parameter, in the compute dtype, from shards along `dim` that are padded to equal size. Its gradient is
    summed over the group in dtype `reduce` and comes back as a shard in the stored dtype."""
    return _GatherParam.apply(shard, dim, size, dtype, reduce, ranks, group)
