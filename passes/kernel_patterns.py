"""Finds, by structure, what a model writes out of operators that kernels compute in one go.

Nothing is known of particular models. Each function takes the last node of a pattern and gives what it stands for, or
None. Nodes in between must have no other reader, so that they vanish.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, fx

from omnicompile.passes.propagate import schema_values

aten = torch.ops.aten
_SUM = 2  # aten's code of `reduction`
_CASTS = frozenset({aten.to.dtype, aten.to.dtype_layout, aten.to.other, aten._to_copy.default, aten.type_as.default})
_RESHAPES = frozenset({aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten._unsafe_view.default,
                       aten.alias.default, aten.contiguous.default})  # fmt: skip


@dataclass(frozen=True)
class RmsNorm:
    """result: the node whose value it gives. early_cast: see omnicompile::rms_norm."""

    result: fx.Node
    input: fx.Node
    weight: fx.Node
    eps: float
    offset: float
    early_cast: bool


@dataclass(frozen=True)
class Swiglu:
    result: fx.Node
    gate: fx.Node
    up: fx.Node


@dataclass(frozen=True)
class Rope:
    result: fx.Node
    x: fx.Node
    cos: fx.Node
    sin: fx.Node


@dataclass(frozen=True)
class CrossEntropy:
    """A sum over tokens. logits: [tokens, classes]."""

    result: fx.Node
    logits: fx.Node
    target: fx.Node
    ignore: int


@dataclass(frozen=True)
class LinearCrossEntropy:
    """hidden: [..., hidden], whose rows are the tokens."""

    result: fx.Node
    hidden: fx.Node
    weight: fx.Node
    target: fx.Node
    ignore: int


def value_of(node: object) -> Tensor | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def _is(node: object, target: object) -> TypeGuard[fx.Node]:
    return isinstance(node, fx.Node) and node.target is target


def _inner(node: object) -> bool:
    """Read once only."""
    return isinstance(node, fx.Node) and len(node.users) == 1


def _is_cast(node: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in _CASTS


def _uncast(node: fx.Node) -> fx.Node:
    """What a cast is of; anything else as it is."""
    source = node.args[0] if _is_cast(node) else node
    assert isinstance(source, fx.Node)
    return source


def _factors(node: object) -> list[tuple[fx.Node, fx.Node]]:
    """The two factors of a product of tensors, both ways round."""
    if not isinstance(node, fx.Node) or node.target is not aten.mul.Tensor:
        return []
    first, second = node.args[:2]
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return []
    return [(first, second), (second, first)]


# Root mean square normalisation --------------------------------------------------------------------------------------


def match_rms_norm(node: fx.Node) -> RmsNorm | None:
    """mul(w, to(mul(x32, rsqrt(add(mean(pow(x32, 2), -1), eps)))))   where x32 = to(x, float32), or rounded last."""
    if node.target is aten.rms_norm.default:
        return _whole_norm(node)
    for normed, scale in _factors(node):
        inner = _uncast(normed) if _is_cast(normed) and _inner(normed) else normed
        found = _normalised(inner) if _inner(inner) else None
        weight = _weight(scale)
        if found is not None and weight is not None:
            return _norm(node, found, weight, early=normed is not inner)
    return None


def _norm(node: fx.Node, found: tuple[fx.Node, float], weight: tuple[fx.Node, float], early: bool) -> RmsNorm | None:
    """Sorts out where the value is rounded to the input's dtype: before the product with the weight, or after it."""
    (x, eps), (scale, offset) = found, weight
    x_value, w_value, value = value_of(x), value_of(scale), value_of(node)
    if x_value is None or w_value is None or value is None or value.shape != x_value.shape:
        return None
    if w_value.dtype != x_value.dtype or w_value.shape != x_value.shape[-1:]:
        return None
    result = node
    if value.dtype != x_value.dtype:
        readers = list(node.users)
        if early or len(readers) != 1 or not _is_cast(readers[0]):
            return None
        result = readers[0]
        if result.meta["val"].dtype != x_value.dtype:
            return None
    return RmsNorm(result, x, scale, eps, offset, early)


def _normalised(node: fx.Node) -> tuple[fx.Node, float] | None:
    """x and eps of x32 * rsqrt(mean(x32 ** 2) + eps)."""
    for wide, root in _factors(node):
        if not _is(root, aten.rsqrt.default) or not _inner(root):
            continue
        total = root.args[0]
        if not _is(total, aten.add.Tensor) or not isinstance(total.args[1], int | float):
            continue
        mean, eps = total.args[:2]
        if _is(mean, aten.mean.dim) and _over_last(mean) and _square_of(mean.args[0], wide):
            x = _uncast(wide)
            plain = x.meta["val"].dtype == wide.meta["val"].dtype
            return (wide if plain else x), float(eps)
    return None


def _over_last(mean: fx.Node) -> bool:
    values = schema_values(mean)
    source = value_of(values["self"])
    return source is not None and bool(values["keepdim"]) and list(values["dim"]) in ([-1], [source.dim() - 1])


def _square_of(node: object, x: fx.Node) -> bool:
    if _is(node, aten.pow.Tensor_Scalar):
        return node.args[0] is x and node.args[1] == 2
    return any(pair == (x, x) for pair in _factors(node))


def _weight(node: fx.Node) -> tuple[fx.Node, float] | None:
    """(w, 0) of `w` or a cast of it, (w, c) of `w + c`."""
    offset = 0.0
    if node.target is aten.add.Tensor:
        terms = list(node.args[:2])
        numbers = [t for t in terms if isinstance(t, int | float)]
        nodes = [t for t in terms if isinstance(t, fx.Node)]
        if len(numbers) != 1 or len(nodes) != 1 or node.kwargs:
            return None
        node, offset = nodes[0], float(numbers[0])
    weight = _uncast(node)
    value = value_of(weight)
    return (weight, offset) if value is not None and value.dim() == 1 and value.is_floating_point() else None


def _whole_norm(node: fx.Node) -> RmsNorm | None:
    values = schema_values(node)
    x, weight = value_of(values["input"]), value_of(values["weight"])
    if x is None or weight is None or weight.dtype != x.dtype or list(values["normalized_shape"]) != [x.shape[-1]]:
        return None
    eps = torch.finfo(x.dtype).eps if values["eps"] is None else float(values["eps"])
    return RmsNorm(node, values["input"], values["weight"], eps, 0.0, False)


# Gates and rotary embeddings -----------------------------------------------------------------------------------------


def match_swiglu(node: fx.Node) -> Swiglu | None:
    """mul(silu(gate), up)"""
    for gated, up in _factors(node):
        if not _is(gated, aten.silu.default) or not _inner(gated):
            continue
        gate = gated.args[0]
        first, second = value_of(gate), value_of(up)
        if first is not None and second is not None and first.shape == second.shape and first.dtype == second.dtype:
            assert isinstance(gate, fx.Node)
            return Swiglu(node, gate, up)
    return None


def match_rope(node: fx.Node) -> Rope | None:
    """add(mul(x, cos), mul(cat([neg(second half of x), first half of x]), sin))"""
    if node.target is not aten.add.Tensor or node.kwargs:
        return None
    for straight, turned in (node.args[:2], node.args[1::-1]):
        if not _inner(straight) or not _inner(turned):
            continue
        for halves, sin in _factors(turned):
            x = _rotated(halves) if _inner(halves) else None
            cos = next((c for x_again, c in _factors(straight) if x_again is x), None)
            if x is not None and cos is not None and _fit(node, x, cos, sin):
                return Rope(node, x, cos, sin)
    return None


def _fit(node: fx.Node, x: fx.Node, *tables: fx.Node) -> bool:
    value, whole = value_of(x), value_of(node)
    if value is None or whole is None or whole.shape != value.shape or whole.dtype != value.dtype:
        return False
    found = [value_of(table) for table in tables]
    return all(t is not None and t.dtype == value.dtype and t.dim() == value.dim() for t in found)


def _rotated(node: fx.Node) -> fx.Node | None:
    """x of cat([-second half of x, first half of x], -1)."""
    if node.target is not aten.cat.default:
        return None
    values = schema_values(node)
    value, parts = value_of(node), values["tensors"]
    if value is None or len(parts) != 2 or values["dim"] not in (-1, value.dim() - 1):
        return None
    second, first = parts
    if not _is(second, aten.neg.default):
        return None
    x, y = _half(second.args[0], 1), _half(first, 0)
    return x if x is y else None


def _half(node: object, which: int) -> fx.Node | None:
    """x, if `node` is its first (0) or second (1) half along the last dimension."""
    if not isinstance(node, fx.Node):
        return None
    if node.target is operator.getitem:
        parts = node.args[0]
        if not isinstance(parts, fx.Node) or parts.target not in (aten.chunk.default, aten.split.Tensor):
            return None
        source, place = parts.args[0], node.args[1]
        dim = schema_values(parts)["dim"]
        start = place * (value_of(node).shape[-1]) if isinstance(place, int) else -1  # type: ignore[union-attr]
    elif node.target is aten.slice.Tensor:
        values = schema_values(node)
        source, dim, start = values["self"], values["dim"], values["start"] or 0
        if values["step"] != 1:
            return None
    else:
        return None
    whole, part = value_of(source), value_of(node)
    if whole is None or part is None or dim not in (-1, whole.dim() - 1):
        return None
    size = whole.shape[-1]
    return source if part.shape[-1] * 2 == size and start % size == which * size // 2 else None  # type: ignore[return-value]


# Losses --------------------------------------------------------------------------------------------------------------


def match_cross_entropy(node: fx.Node) -> CrossEntropy | None:
    """A sum over tokens without class weights and label smoothing."""
    if node.target is not aten.cross_entropy_loss.default:
        return None
    values = schema_values(node)
    logits, target = value_of(values["self"]), value_of(values["target"])
    if logits is None or target is None or logits.dim() != 2 or target.dim() != 1:
        return None
    if values["reduction"] != _SUM or values["weight"] is not None or values["label_smoothing"]:
        return None
    return CrossEntropy(node, values["self"], values["target"], int(values["ignore_index"]))


def match_linear_cross_entropy(node: fx.Node) -> LinearCrossEntropy | None:
    """cross_entropy(view(to(linear(h, w), float32)), y, reduction=sum), where nothing else reads the logits."""
    loss = match_cross_entropy(node)
    if loss is None:
        return None
    logits, classes = loss.logits, value_of(loss.logits).shape[-1]  # type: ignore[union-attr]
    while logits.target is not aten.linear.default:
        source = logits.args[0] if logits.args else None
        passes = logits.target in _RESHAPES or _is_cast(logits)
        if not _inner(logits) or not passes or not isinstance(source, fx.Node):
            return None
        value, before = value_of(logits), value_of(source)
        if value is None or before is None or before.shape[-1] != classes:
            return None
        if value.dtype != before.dtype and value.dtype != torch.promote_types(before.dtype, torch.float32):
            return None
        logits = source
    values = schema_values(logits)
    hidden, weight = value_of(values["input"]), value_of(values["weight"])
    if not _inner(logits) or values["bias"] is not None or hidden is None or weight is None:
        return None
    if hidden.dtype != weight.dtype:
        return None
    return LinearCrossEntropy(node, values["input"], values["weight"], loss.target, loss.ignore)
