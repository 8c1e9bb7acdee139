"""The operators of omnicompile/kernels/operators.py, which stand for several of the model's: they are cut as those."""

from __future__ import annotations

from omnicompile.kernels import operators as _operators  # noqa: F401  (defines the operators)
from omnicompile.passes.placement import PARTIAL
from omnicompile.passes.rules.base import Choice, OpCall, Rule, aligned, candidate_shards, output_targets
from omnicompile.passes.rules.pointwise import pointwise


def rms_norm(call: OpCall) -> list[Choice]:
    """Any cut but of the dimension that is normalised."""
    last = len(call.shape("input")) - 1
    shards = [shard for shard in candidate_shards(call, "input") if shard.dim != last]
    return [Choice({"input": shard}, (shard, shard)) for shard in shards]


def rope(call: OpCall) -> list[Choice]:
    """Any cut but of the dimension whose halves are exchanged; the tables are cut where they have the dimension."""
    choices = []
    for target in output_targets(call):
        required = aligned(call, target, call.out)
        if target.dim != len(call.out) - 1 and required is not None and call.fits(call.out, target):
            choices.append(Choice(required, (target,)))
    return choices


def _loss(call: OpCall, name: str, rest: int) -> list[Choice]:
    """Tokens are cut, of the [tokens, ...] input `name` and of the targets. The loss is a sum, and so are the `rest`
    outputs after the gradient of the input."""
    shards = [shard for shard in candidate_shards(call, name) if shard.dim == 0]
    return [Choice({name: shard, "target": shard}, (PARTIAL, shard, *[PARTIAL] * rest)) for shard in shards]


def cross_entropy(call: OpCall) -> list[Choice]:
    return _loss(call, "logits", 0)


def linear_cross_entropy(call: OpCall) -> list[Choice]:
    return _loss(call, "hidden", 1)


RULES: dict[str, Rule] = {
    "omnicompile::rms_norm": rms_norm,
    "omnicompile::swiglu": pointwise,
    "omnicompile::rope": rope,
    "omnicompile::cross_entropy": cross_entropy,
    "omnicompile::linear_cross_entropy": linear_cross_entropy,
}
