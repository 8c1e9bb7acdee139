"""Element-wise operators: they keep any cut; linear ones keep Partial too."""

from __future__ import annotations

import math

import torch
from torch import fx

from omnicompile.passes.placement import Shard
from omnicompile.passes.rules.base import (
    PARTIAL,
    RANK,
    REPLICATE,
    Choice,
    OpCall,
    Rule,
    aligned,
    is_partial,
    output_targets,
)

# Element-wise, but not tagged so in torch: conversions, copies and composites of element-wise operators.
_UNTAGGED = (
    "to", "_to_copy", "alias", "detach", "clone", "contiguous", "lift_fresh_copy", "type_as", "float", "half",
    "bfloat16", "double", "int", "long", "masked_fill", "where", "dropout", "feature_dropout", "silu", "gelu",
    "relu6", "leaky_relu", "softplus", "mish", "hardswish", "zeros_like", "ones_like", "full_like", "empty_like",
    "square", "sigmoid", "tanh", "relu", "exp", "log", "sin", "cos", "rsqrt", "sqrt", "pow", "abs", "neg",
    "reciprocal", "clamp", "clamp_min", "clamp_max", "isnan", "isinf", "nan_to_num", "logical_not", "logical_and",
    "logical_or", "eq", "ne", "lt", "le", "gt", "ge", "minimum", "maximum", "add", "sub", "mul", "div", "rsub",
    "true_divide", "floor_divide", "remainder", "lerp", "addcmul", "addcdiv", "__and__", "__or__", "bitwise_and",
    "bitwise_or", "bitwise_not", "expand_as", "alias_copy", "sign", "isfinite", "log1p", "expm1", "erf", "round",
    "floor", "ceil", "log_sigmoid", "elu", "selu", "celu", "hardsigmoid", "hardtanh", "logit", "xor", "bitwise_xor",
    "__xor__", "_assert_tensor_metadata", "copy", "erfinv", "lift_fresh", "conj", "real",
)  # fmt: skip

# Linear in its first tensor argument alone (the others must be Replicate).
_LINEAR_ONE = frozenset({
    "to", "_to_copy", "alias", "detach", "clone", "contiguous", "type_as", "float", "half", "bfloat16", "double",
    "neg", "mul", "div", "true_divide",
})  # fmt: skip


def pointwise(call: OpCall) -> list[Choice]:
    choices = []
    for target in output_targets(call):
        required = aligned(call, target, call.out)
        if required is not None and (target.ragged or call.fits(call.out, target)):
            choices.append(Choice(required, (target,)))
    return choices + _linear(call)


def _linear(call: OpCall) -> list[Choice]:
    tensors = call.tensors()
    partial = [name for name, node in tensors if is_partial(call.placements[node])]
    if not partial or not call.node.meta["val"].is_floating_point():
        return []
    if call.name in ("add", "sub") and len(tensors) == 2:
        return [Choice({name: PARTIAL for name, _ in tensors}, (PARTIAL,))]
    if call.name in _LINEAR_ONE and (partial == ["self"] or (call.name == "mul" and partial == ["other"])):
        return [Choice({partial[0]: PARTIAL}, (PARTIAL,))]
    return []


def is_tagged_pointwise(target: object) -> bool:
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def dropout(call: OpCall) -> list[Choice]:
    """Dropout with probability 0 or out of training changes nothing; the engine refuses any other."""
    return pointwise(call)


def keyed(call: OpCall) -> list[Choice]:
    """`omnicompile::dropout`, `uniform`: each rank draws what is drawn of the whole at the places of its piece. Dropout
    is linear; what `uniform` draws does not depend on the values that it is like."""
    name = "x" if call.has("x") else "like"
    own, shape = call.placement(name), call.shape(name)
    if is_partial(own):
        return [Choice({name: PARTIAL}, (PARTIAL if name == "x" else REPLICATE,))]
    if not isinstance(own, Shard) or own.ragged or not call.fits(shape, own):
        return []
    block = math.prod(shape[own.dim :]) // (own.outer * call.ranks)
    return [Choice({name: own}, (own,), {"rank": RANK, "block": block, "ranks": call.ranks})]


def cat(call: OpCall) -> list[Choice]:
    """Along a dimension that is not cut; of ragged rows never."""
    name = "tensors"
    stacking = call.name == "stack"
    dim = call.values["dim"] % max(1, len(call.out))
    choices = []
    for own in dict.fromkeys(call.placements[node] for _, node in call.tensors()):
        if not isinstance(own, Shard) or (not stacking and own.dim == dim):
            continue
        target = Shard(own.dim + (stacking and own.dim >= dim), own.outer, own.ragged)
        if call.fits(call.out, target):
            choices.append(Choice({name: tuple(own for _ in call.tensors())}, (target,)))
    if call.tensors() and all(is_partial(call.placements[n]) for _, n in call.tensors()):
        choices.append(Choice({name: tuple(PARTIAL for _ in call.tensors())}, (PARTIAL,)))
    return choices


def creation(call: OpCall) -> list[Choice]:
    """`new_zeros(x, size)`: the values do not depend on x, which may lie as it likes; the result is whole."""
    own = call.placement("self")
    return [Choice({"self": own}, (REPLICATE,))] if isinstance(call.values.get("self"), fx.Node) else []


RULES: dict[str, Rule] = {
    **{f"aten::{name}": pointwise for name in _UNTAGGED},
    "aten::dropout": dropout,
    "omnicompile::dropout": keyed,
    "omnicompile::uniform": keyed,
    "aten::cat": cat,
    "aten::concat": cat,
    "aten::stack": cat,
    **{f"aten::{name}": creation for name in ("new_zeros", "new_ones", "new_empty", "new_full")},
}
