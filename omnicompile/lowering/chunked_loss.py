"""The chunked loss head: the last linear layer and the cross-entropy over it, some tokens at a time.

    logits = linear(hidden, weight); loss = cross_entropy(logits.float(), targets, reduction="sum")
 -> loss, _ = linear_cross_entropy(hidden, weight, targets)

The logits of a chunk exist only while the chunk is worked on; the backward computes them again from the saved
log-sum-exp of each token, as attention does.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

CHUNK_BYTES = 256 << 20  # of float32 logits of one chunk
_SUM = 2
_DEFAULTS: tuple[Any, ...] = (None, None, None, 1, -100, 0.0)  # of cross_entropy_loss
_aten = torch.ops.aten
_PASSING = frozenset(
    {
        _aten.view.default, _aten.reshape.default, _aten._to_copy.default, _aten.to.dtype, _aten.contiguous.default,
        _aten.flatten.using_ints, _aten.alias.default, _aten.slice.Tensor,
    }
)  # fmt: skip


def _chunks(hidden: Tensor, weight: Tensor) -> list[tuple[int, int]]:
    size = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    return [(start, min(start + size, hidden.shape[0])) for start in range(0, hidden.shape[0], size)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.custom_op("omnicompile::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    """hidden [tokens, width], weight [vocabulary, width], targets [tokens] -> the sum of the cross-entropies of tokens
    whose target is not `ignore`, and the log-sum-exp of the logits of every token, both in float32 (float64 for it)."""
    wide = _wide(hidden.dtype)
    total = torch.zeros((), dtype=wide, device=hidden.device)
    lse = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
    for start, end in _chunks(hidden, weight):
        logits = F.linear(hidden[start:end], weight).to(wide)
        lse[start:end] = logits.logsumexp(-1)
        wanted = targets[start:end]
        chosen = logits.gather(1, wanted.clamp(min=0).unsqueeze(1)).squeeze(1)
        total += torch.where(wanted == ignore, 0, lse[start:end] - chosen).sum()
    return total, lse


@linear_cross_entropy.register_fake
def _fake(hidden: Tensor, weight: Tensor, targets: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    wide = _wide(hidden.dtype)
    return hidden.new_empty((), dtype=wide), hidden.new_empty(hidden.shape[0], dtype=wide)


@torch.library.custom_op("omnicompile::linear_cross_entropy_backward", mutates_args=())
def linear_cross_entropy_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, ignore: int
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight for the gradient `grad` (0-d) of the sum."""
    d_hidden = torch.empty_like(hidden)
    d_weight = torch.zeros(weight.shape, dtype=lse.dtype, device=weight.device)
    for start, end in _chunks(hidden, weight):
        rows, wanted = hidden[start:end], targets[start:end]
        d_logits = (F.linear(rows, weight).to(lse.dtype) - lse[start:end].unsqueeze(1)).exp()
        d_logits.scatter_add_(
            1, wanted.clamp(min=0).unsqueeze(1), torch.full_like(wanted, -1, dtype=lse.dtype).unsqueeze(1)
        )
        d_logits *= torch.where(wanted == ignore, 0, grad).unsqueeze(1)
        narrow = d_logits.to(hidden.dtype)
        d_hidden[start:end] = narrow @ weight
        d_weight += narrow.t() @ rows
    return d_hidden, d_weight.to(weight.dtype)


@linear_cross_entropy_backward.register_fake
def _backward_fake(
    grad: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, ignore: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden), torch.empty_like(weight)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, targets, ctx.ignore = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(hidden, weight, targets, output[1])


def _gradient(ctx: Any, grad: Tensor, _lse: Tensor) -> tuple[Tensor | None, ...]:
    backward = torch.ops.omnicompile.linear_cross_entropy_backward
    return (*backward(grad, *ctx.saved_tensors, ctx.ignore), None, None)


linear_cross_entropy.register_autograd(_gradient, setup_context=_setup)


def chunk_loss_pass(gm: fx.GraphModule) -> str:
    """Rewrite the loss head of a lowered forward, in place. Returns why it could not be done, "" when it was."""
    found = [n for n in gm.graph.nodes if n.target is _aten.cross_entropy_loss.default]
    if len(found) != 1:
        return f"the forward has {len(found)} cross-entropies"
    loss = found[0]
    given: list[Any] = list(loss.args)
    logits, targets, weight, reduction, ignore, smoothing = given + list(_DEFAULTS[len(given) :])
    if weight is not None or smoothing or reduction != _SUM:
        return "the cross-entropy is weighted, smoothed or not a sum"
    linear = _linear_behind(logits)
    if linear is None:
        return (
            "other operators lie between the last linear layer and the cross-entropy, or the logits are read elsewhere"
        )
    with gm.graph.inserting_before(loss):
        hidden = gm.graph.call_function(_aten.reshape.default, (linear.args[0], [-1, _width(linear)]))
        op = torch.ops.omnicompile.linear_cross_entropy.default
        fused = gm.graph.call_function(op, (hidden, linear.args[1], targets, ignore))
        total = gm.graph.call_function(operator.getitem, (fused, 0))
    for node in (hidden, fused, total):
        node.meta.update({k: v for k, v in loss.meta.items() if k != "val"})
    loss.replace_all_uses_with(total)
    gm.graph.erase_node(loss)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return ""


def _linear_behind(logits: fx.Node) -> fx.Node | None:
    """The linear layer without bias whose result reaches the cross-entropy and nothing else, its rows in order."""
    node = logits
    vocabulary = _shape(logits)[-1]
    while len(node.users) == 1:
        if node.target is _aten.linear.default:
            return node if len(node.args) < 3 or node.args[2] is None else None
        if node.target not in _PASSING or _shape(node.all_input_nodes[0])[-1] != vocabulary or _drops_rows(node):
            return None
        node = node.all_input_nodes[0]
    return None


def _drops_rows(node: fx.Node) -> bool:
    before, after = (torch.Size(_shape(n)).numel() for n in (node.all_input_nodes[0], node))
    return before != after


def _width(linear: fx.Node) -> int:
    source = linear.args[0]
    assert isinstance(source, fx.Node)
    return _shape(source)[-1]


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return tuple(value.shape)
