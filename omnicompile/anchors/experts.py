"""Anchor operators of a mixture-of-experts layer.

A layer is captured as `expert_dispatch` (tokens -> rows sorted by expert), `grouped_mm` per projection, the model's own
gate function between them as ordinary operators on the rows, and `expert_combine` (rows -> tokens, weighted). Expert
parallelism rewrites dispatch and combine and leaves what lies between them alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from omnicompile.kernels.grouped import problem_of
from omnicompile.kernels.registry import Functions
from omnicompile.kernels.table import default_kernel, functions_of


@torch.library.custom_op("omnicompile::expert_dispatch", mutates_args=())
def expert_dispatch(x: Tensor, index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [tokens, hidden], index [tokens, top_k] (expert of each choice) -> rows [tokens * top_k, hidden] by expert,
    order [tokens * top_k] (the flat choice each row came from) and counts [experts] (rows per expert)."""
    flat = index.reshape(-1)
    order = torch.sort(flat, stable=True).indices
    return x[order // index.shape[1]], order, torch.bincount(flat, minlength=experts)


@expert_dispatch.register_fake
def _dispatch_fake(x: Tensor, index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = index.shape[0] * index.shape[1]
    long = {"dtype": torch.int64}
    return x.new_empty(rows, x.shape[1]), x.new_empty(rows, **long), x.new_empty(experts, **long)


@torch.library.custom_op("omnicompile::expert_dispatch_backward", mutates_args=())
def expert_dispatch_backward(grad: Tensor, order: Tensor, tokens: int) -> Tensor:
    """Sum of the gradients of a token's rows: [rows, hidden] -> [tokens, hidden]."""
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    return grad[inverse].unflatten(0, (tokens, -1)).sum(1)


@expert_dispatch_backward.register_fake
def _dispatch_backward_fake(grad: Tensor, order: Tensor, tokens: int) -> Tensor:
    return grad.new_empty(tokens, grad.shape[1])


def _dispatch_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(output[1])
    ctx.tokens = inputs[0].shape[0]


def _dispatch_grad(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    (order,) = ctx.saved_tensors
    return torch.ops.omnicompile.expert_dispatch_backward(grad, order, ctx.tokens), None, None


expert_dispatch.register_autograd(_dispatch_grad, setup_context=_dispatch_setup)


def _slices(counts: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, past-the-last row) of the experts that have rows."""
    bounds, start = [], 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            bounds.append((expert, start, start + count))
        start += count
    return bounds


def _grouped_functions(kernel: str, rows: Tensor, weight: Sequence[int]) -> Functions:
    """weight: its shape."""
    return functions_of("grouped_mm", kernel or default_kernel(problem_of(rows, weight)).name)


@torch.library.custom_op("omnicompile::grouped_mm", mutates_args=())
def grouped_mm(rows: Tensor, weight: Tensor, counts: Tensor, transposed: bool, implementation: str = "") -> Tensor:
    """rows [r, k] sorted by expert times each row's expert matrix: weight [experts, n, k], or [experts, k, n] when
    `transposed`. Returns [r, n]. Rows past sum(counts) give zeros. implementation: of omnicompile/kernels;
    "" takes the first one that computes this here."""
    result: Tensor = _grouped_functions(implementation, rows, weight.shape).forward(rows, weight, counts, transposed)
    return result


@grouped_mm.register_fake
def _grouped_mm_fake(
    rows: Tensor, weight: Tensor, counts: Tensor, transposed: bool, implementation: str = ""
) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2] if transposed else weight.shape[1])


@torch.library.custom_op("omnicompile::grouped_mm_weight", mutates_args=())
def grouped_mm_weight(rows: Tensor, grad: Tensor, counts: Tensor, transposed: bool, implementation: str = "") -> Tensor:
    """Gradient of `grouped_mm`'s weight: rows [r, k], grad [r, n] -> [experts, n, k] (or [experts, k, n])."""
    shape = counts.shape[0], *((rows.shape[1], grad.shape[1]) if transposed else (grad.shape[1], rows.shape[1]))
    found = _grouped_functions(implementation, rows, shape)
    result: Tensor = found.backward(rows, grad, counts, transposed)
    return result


@grouped_mm_weight.register_fake
def _grouped_mm_weight_fake(
    rows: Tensor, grad: Tensor, counts: Tensor, transposed: bool, implementation: str = ""
) -> Tensor:
    left, right = (rows, grad) if transposed else (grad, rows)
    return rows.new_empty(counts.shape[0], left.shape[1], right.shape[1])


def _grouped_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weight, counts, transposed, implementation = inputs
    ctx.save_for_backward(rows, weight, counts)
    ctx.transposed, ctx.implementation = transposed, implementation


def _grouped_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, weight, counts = ctx.saved_tensors
    d_rows = d_weight = None
    if ctx.needs_input_grad[0]:
        d_rows = torch.ops.omnicompile.grouped_mm(grad, weight, counts, not ctx.transposed, ctx.implementation)
    if ctx.needs_input_grad[1]:
        d_weight = torch.ops.omnicompile.grouped_mm_weight(rows, grad, counts, ctx.transposed, ctx.implementation)
    return d_rows, d_weight, None, None, None


grouped_mm.register_autograd(_grouped_grad, setup_context=_grouped_setup)


@torch.library.custom_op("omnicompile::expert_bias", mutates_args=())
def expert_bias(bias: Tensor, counts: Tensor, rows: int) -> Tensor:
    """Each row's expert bias: [experts, n] -> [rows, n]."""
    return torch.repeat_interleave(bias, counts, dim=0, output_size=rows)


@expert_bias.register_fake
def _expert_bias_fake(bias: Tensor, counts: Tensor, rows: int) -> Tensor:
    return bias.new_empty(rows, bias.shape[1])


@torch.library.custom_op("omnicompile::expert_bias_backward", mutates_args=())
def expert_bias_backward(grad: Tensor, counts: Tensor) -> Tensor:
    """Sum of each expert's rows: [rows, n] -> [experts, n]."""
    out = grad.new_zeros(counts.shape[0], grad.shape[1])
    for expert, start, end in _slices(counts):
        out[expert] = grad[start:end].sum(0)
    return out


@expert_bias_backward.register_fake
def _expert_bias_backward_fake(grad: Tensor, counts: Tensor) -> Tensor:
    return grad.new_empty(counts.shape[0], grad.shape[1])


def _bias_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _bias_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (counts,) = ctx.saved_tensors
    return torch.ops.omnicompile.expert_bias_backward(grad, counts), None, None


expert_bias.register_autograd(_bias_grad, setup_context=_bias_setup)


@torch.library.custom_op("omnicompile::expert_combine", mutates_args=())
def expert_combine(rows: Tensor, order: Tensor, weight: Tensor) -> Tensor:
    """Weighted sum of each token's rows: rows [tokens * top_k, hidden], weight [tokens, top_k] -> [tokens, hidden]."""
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    chosen = rows[inverse].unflatten(0, tuple(weight.shape))
    return (chosen * weight.unsqueeze(-1).to(rows.dtype)).sum(1)


@expert_combine.register_fake
def _combine_fake(rows: Tensor, order: Tensor, weight: Tensor) -> Tensor:
    return rows.new_empty(weight.shape[0], rows.shape[1])


@torch.library.custom_op("omnicompile::expert_combine_backward", mutates_args=())
def expert_combine_backward(grad: Tensor, rows: Tensor, order: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the rows and of the routing weights."""
    of_row = grad[order // weight.shape[1]]
    d_rows = of_row * weight.reshape(-1)[order].unsqueeze(-1).to(rows.dtype)
    d_flat = torch.zeros(weight.numel(), dtype=weight.dtype, device=weight.device)
    d_flat = d_flat.scatter(0, order, (of_row * rows).sum(-1).to(weight.dtype))
    return d_rows, d_flat.view(weight.shape)


@expert_combine_backward.register_fake
def _combine_backward_fake(grad: Tensor, rows: Tensor, order: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), weight.new_empty(weight.shape)


def _combine_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _combine_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, order, weight = ctx.saved_tensors
    d_rows, d_weight = torch.ops.omnicompile.expert_combine_backward(grad, rows, order, weight)
    return d_rows, None, d_weight


expert_combine.register_autograd(_combine_grad, setup_context=_combine_setup)
