"""Reductions and losses: over a cut dimension they give a Partial result, or need the dimension whole."""

from __future__ import annotations

from typing import Any

from omnicompile.passes.placement import PARTIAL, Shard
from omnicompile.passes.rules.base import Choice, OpCall, Rule, candidate_shards, is_partial, wrap

_NONE, _MEAN, _SUM = 0, 1, 2  # aten's codes of `reduction`
_REDUCTIONS = (
    "sum", "mean", "amax", "amin", "max", "min", "var", "std", "argmax", "argmin", "all", "any", "prod", "logsumexp",
    "norm", "linalg_vector_norm",
)  # fmt: skip
_POINTWISE_LOSSES = (
    "mse_loss", "l1_loss", "smooth_l1_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits",
)  # fmt: skip


def _dims(call: OpCall, ndim: int) -> set[int]:
    value: Any = call.values.get("dim")
    if value is None or (isinstance(value, list | tuple) and not value):
        return set(range(ndim))
    return {wrap(d, ndim) for d in ([value] if isinstance(value, int) else value)}


def _after(shard: Shard, dims: set[int], keep: bool) -> Shard:
    return shard if keep else Shard(shard.dim - sum(d < shard.dim for d in dims), shard.outer, shard.ragged)


def reduction(call: OpCall) -> list[Choice]:
    """sum, mean: a cut dimension may be reduced; amax, var, argmax, ...: it may not."""
    shape = call.shape("self")
    dims, keep = _dims(call, len(shape)), bool(call.values.get("keepdim"))
    linear = call.name in ("sum", "mean")
    choices = []
    for shard in candidate_shards(call, "self"):
        if shard.dim not in dims:
            choices.append(Choice({"self": shard}, (_after(shard, dims, keep),)))
        elif call.name == "sum":
            choices.append(Choice({"self": shard}, (PARTIAL,)))
        elif call.name == "mean" and not shard.ragged:
            choices.append(Choice({"self": shard}, (PARTIAL,), scale=1.0 / call.ranks))
    if linear and is_partial(call.placement("self")):
        choices.append(Choice({"self": PARTIAL}, (PARTIAL,)))
    return choices


def cross_entropy(call: OpCall) -> list[Choice]:
    """Classes (dimension 1, or 0 of a single sample) are never cut. A sum is Partial; the mean is not the mean of
    means, since ranks have different numbers of targets: the loss pass turns it into a sum first."""
    shape, target = call.shape("self"), call.shape("target")
    reduced = call.values["reduction"]
    if len(shape) < 2 or len(target) == len(shape):
        return []
    choices = []
    for shard in candidate_shards(call, "self"):
        if shard.dim == 1 or shard.ragged:
            continue
        labels = Shard(shard.dim - (shard.dim > 1), shard.outer)
        if reduced == _SUM:
            choices.append(Choice({"self": shard, "target": labels}, (PARTIAL,)))
        elif reduced == _NONE:
            choices.append(Choice({"self": shard, "target": labels}, (labels,)))
    return choices


def pointwise_loss(call: OpCall) -> list[Choice]:
    """mse_loss and the like: an element-wise loss of two tensors of one shape, then nothing, mean or sum."""
    reduced = call.values["reduction"]
    names = [n for n in ("self", "target", "weight") if call.has(n)]
    if any(call.shape(n) != call.shape("self") for n in names) or call.has("pos_weight"):
        return []
    choices = []
    for shard in candidate_shards(call, "self"):
        inputs = dict.fromkeys(names, shard)
        if reduced == _NONE:
            choices.append(Choice(inputs, (shard,)))
        elif not shard.ragged:
            scale = 1.0 / call.ranks if reduced == _MEAN else 1.0
            choices.append(Choice(inputs, (PARTIAL,), scale=scale))
    return choices


def histogram(call: OpCall) -> list[Choice]:
    """Counts of the parts add up, if the range of the bins is given and not found from the data."""
    if call.values["min"] == call.values["max"]:
        return []
    return [Choice({"self": shard}, (PARTIAL,)) for shard in candidate_shards(call, "self")]


RULES: dict[str, Rule] = {
    "aten::histc": histogram,
    **{f"aten::{name}": reduction for name in _REDUCTIONS},
    "aten::cross_entropy_loss": cross_entropy,
    **{f"aten::{name}": pointwise_loss for name in _POINTWISE_LOSSES},
}
