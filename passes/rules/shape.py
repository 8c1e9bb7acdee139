"""Operators along one dimension which the others do not meet: softmax, norms, sorting, cumulative sums, convolution."""

from __future__ import annotations

from typing import Any

from omnicompile.passes.placement import Shard
from omnicompile.passes.rules.base import Choice, OpCall, Rule, candidate_shards, wrap

_ALONG_DIM = (
    "softmax", "_softmax", "log_softmax", "_log_softmax", "topk", "sort", "argsort", "cumsum", "cumprod",
    "logcumsumexp", "glu",
)  # fmt: skip


def along(name: str, tensor: str = "self") -> Rule:
    """The dimension(s) given by argument `name` must not be cut, any other may be."""

    def rule(call: OpCall) -> list[Choice]:
        ndim = len(call.shape(tensor))
        value = call.values[name]
        if value is None:
            return []
        used = {wrap(d, ndim) for d in ([value] if isinstance(value, int) else value)}
        return [
            Choice({tensor: shard}, (shard,))
            for shard in candidate_shards(call, tensor)
            if shard.dim not in used and all(shard.ragged or call.fits(out, shard) for out in call.outs)
        ]

    return rule


def norm_last(call: OpCall) -> list[Choice]:
    """layer_norm / rms_norm over the last len(normalized_shape) dimensions, with whole weights."""
    free = len(call.out) - len(call.values["normalized_shape"])
    return [
        Choice({"input": shard}, (shard,))
        for shard in candidate_shards(call, "input")
        if shard.dim < free and (shard.ragged or call.fits(call.out, shard))
    ]


def group_norm(call: OpCall) -> list[Choice]:
    return [Choice({"input": s}, (s,)) for s in candidate_shards(call, "input") if s.dim == 0]


def convolution(call: OpCall) -> list[Choice]:
    """Over images; and over a spatial dimension when patches do not overlap (stride = kernel, no padding)."""
    tensor = "input"
    kernel = call.shape("weight")[2:]
    spatial = len(kernel)
    choices = []
    for shard in candidate_shards(call, tensor):
        if shard.ragged or shard.outer > 1:
            continue
        if shard.dim == 0 and len(call.out) == spatial + 2 and call.fits(call.out, shard):
            choices.append(Choice({tensor: shard}, (shard,)))
        elif shard.dim >= 2 and _apart(call, shard.dim - 2, kernel):
            size = call.shape(tensor)[shard.dim]
            if size % (kernel[shard.dim - 2] * call.ranks) == 0 and call.fits(call.out, shard):
                choices.append(Choice({tensor: shard}, (shard,)))
    return choices


def _apart(call: OpCall, index: int, kernel: tuple[int, ...]) -> bool:
    def at(name: str) -> Any:
        value = call.values[name]
        if isinstance(value, int | str):
            return value
        return value[index] if len(value) > index else value[0]

    return at("stride") == kernel[index] and at("padding") in (0, "valid") and at("dilation") == 1


def one_hot(call: OpCall) -> list[Choice]:
    return [
        Choice({"self": shard}, (Shard(shard.dim, shard.outer, shard.ragged),))
        for shard in candidate_shards(call, "self")
        if call.values["num_classes"] != -1
    ]


RULES: dict[str, Rule] = {
    **{f"aten::{name}": along("dim") for name in _ALONG_DIM},
    "aten::layer_norm": norm_last,
    "aten::rms_norm": norm_last,
    "aten::group_norm": group_norm,
    **{f"aten::conv{n}d": convolution for n in (1, 2, 3)},
    "aten::one_hot": one_hot,
}
