"""Views and copies that move, merge, split or repeat dimensions. Size arguments become local sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from omnicompile.passes.placement import PARTIAL, Shard, through_view
from omnicompile.passes.rules.base import Choice, OpCall, Rule, candidate_shards, is_partial, wrap

Mapping = Callable[[OpCall, Shard], tuple[Shard | None, dict[str, Any]]]


def _rule(name: str, mapping: Mapping) -> Rule:
    """The rule of a linear operator with one tensor, from where a cut goes and which arguments change."""

    def rule(call: OpCall) -> list[Choice]:
        choices = []
        for shard in candidate_shards(call, name):
            target, args = mapping(call, shard)
            if target is not None and (target.ragged or all(call.fits(out, target) for out in call.outs)):
                choices.append(Choice({name: shard}, (target,), args))
        if is_partial(call.placement(name)):
            choices.append(Choice({name: PARTIAL}, (PARTIAL,)))
        return choices

    return rule


def _sized(call: OpCall, name: str, target: Shard) -> dict[str, Any]:
    """The size argument with the cut dimension made local; a ragged one is left to be inferred."""
    sizes = list(call.values[name])
    if target.ragged:
        sizes[target.dim] = -1
    elif sizes[target.dim] != -1:
        sizes[target.dim] //= call.ranks
    return {name: sizes}


def _reshape(call: OpCall, shard: Shard) -> tuple[Shard | None, dict[str, Any]]:
    size = "shape" if "shape" in call.values else "size"
    if shard.ragged:
        # Rows stay the first dimension, the rest may change.
        keeps = call.shape("self")[0] == call.out[0] and shard.dim == 0
        return (shard, _sized(call, size, shard)) if keeps else (None, {})
    target = through_view(call.shape("self"), call.out, shard, call.ranks)
    if target is None:
        return None, {}
    return target, _sized(call, size, target)


def _view(call: OpCall) -> list[Choice]:
    if "dtype" in call.values:
        return _rule("self", lambda c, s: (s if s.dim != len(c.out) - 1 else None, {}))(call)
    return _rule("self", _reshape)(call)


def _flatten(call: OpCall, shard: Shard) -> tuple[Shard | None, dict[str, Any]]:
    if shard.ragged:
        return (shard if call.values["start_dim"] != 0 else None), {}
    return through_view(call.shape("self"), call.out, shard, call.ranks), {}


def _unflatten(call: OpCall, shard: Shard) -> tuple[Shard | None, dict[str, Any]]:
    ndim = len(call.shape("self"))
    dim = wrap(call.values["dim"], ndim)
    if shard.ragged:
        return (shard if shard.dim < dim else None), {}
    target = through_view(call.shape("self"), call.out, shard, call.ranks)
    if target is None:
        return None, {}
    sizes = list(call.values["sizes"])
    if dim <= target.dim < dim + len(sizes) and sizes[target.dim - dim] != -1:
        sizes[target.dim - dim] //= call.ranks
    return target, {"sizes": sizes}


def _moved(shard: Shard, dim: int) -> Shard:
    return Shard(dim, shard.outer, shard.ragged)


def _transpose(call: OpCall, shard: Shard) -> tuple[Shard | None, dict[str, Any]]:
    ndim = len(call.out)
    first = wrap(call.values.get("dim0", 0), ndim)
    second = wrap(call.values.get("dim1", 1), ndim)
    return _moved(shard, {first: second, second: first}.get(shard.dim, shard.dim)), {}


def _t(call: OpCall, shard: Shard) -> tuple[Shard | None, dict[str, Any]]:
    return _moved(shard, len(call.out) - 1 - shard.dim), {}


def _swap_last(call: OpCall, shard: Shard) -> tuple[Shard | None, dict[str, Any]]:
    last = len(call.out) - 1
    return _moved(shard, {last: last - 1, last - 1: last}.get(shard.dim, shard.dim)), {}


def _permute(call: OpCall, shard: Shard) -> tuple[Shard | None, dict[str, Any]]:
    ndim = len(call.out)
    return _moved(shard, [wrap(d, ndim) for d in call.values["dims"]].index(shard.dim)), {}


def _movedim(call: OpCall, shard: Shard) -> tuple[Shard | None, dict[str, Any]]:
    ndim = len(call.out)

    def dims(value: int | Sequence[int]) -> list[int]:
        return [wrap(d, ndim) for d in ([value] if isinstance(value, int) else value)]

    source, target = dims(call.values["source"]), dims(call.values["destination"])
    order = [d for d in range(ndim) if d not in source]
    for to, frm in sorted(zip(target, source)):
        order.insert(to, frm)
    return _moved(shard, order.index(shard.dim)), {}


def _unsqueeze(call: OpCall, shard: Shard) -> tuple[Shard | None, dict[str, Any]]:
    dim = wrap(call.values["dim"], len(call.out))
    return _moved(shard, shard.dim + (shard.dim >= dim)), {}


def _squeeze(call: OpCall, shard: Shard) -> tuple[Shard | None, dict[str, Any]]:
    shape = call.shape("self")
    dims = call.values.get("dim", list(range(len(shape))))
    dims = [wrap(d, len(shape)) for d in ([dims] if isinstance(dims, int) else dims)]
    gone = [d for d in dims if shape[d] == 1]
    if shard.dim in gone:
        return None, {}
    if shape[shard.dim] == call.ranks * shard.outer and shard.dim in dims:
        return None, {}
    return _moved(shard, shard.dim - sum(d < shard.dim for d in gone)), {}


def _expand(call: OpCall, shard: Shard) -> tuple[Shard | None, dict[str, Any]]:
    shape = call.shape("self")
    target = _moved(shard, shard.dim + len(call.out) - len(shape))
    if shape[shard.dim] != call.out[target.dim]:
        return None, {}
    name = "size"
    return target, _sized(call, name, target)


def _repeat(call: OpCall, shard: Shard) -> tuple[Shard | None, dict[str, Any]]:
    times = call.values["repeats"]
    target = _moved(shard, shard.dim + len(times) - len(call.shape("self")))
    return (target if times[target.dim] == 1 else None), {}


def _repeat_interleave(call: OpCall, shard: Shard) -> tuple[Shard | None, dict[str, Any]]:
    dim = call.values.get("dim")
    if not isinstance(call.values["repeats"], int) or dim is None:
        return None, {}
    # Every element is repeated in place, so that a cut stays one, of the repeated dimension too.
    return shard, {}


def _slice(call: OpCall) -> list[Choice]:
    dim = wrap(call.values["dim"], len(call.out))
    whole = call.shape("self")[dim] == call.out[dim] and call.values["step"] == 1

    def mapping(_: OpCall, shard: Shard) -> tuple[Shard | None, dict[str, Any]]:
        if shard.dim != dim:
            return shard, {}
        return (shard, {"start": 0, "end": 2**63 - 1}) if whole else (None, {})

    return _rule("self", mapping)(call)


def _without(*names: str) -> Mapping:
    """Operators along one dimension that must not be cut; the others stay."""

    def mapping(call: OpCall, shard: Shard) -> tuple[Shard | None, dict[str, Any]]:
        ndim = len(call.shape("self"))
        dims: list[int] = []
        for name in names:
            value = call.values[name]
            dims += [wrap(d, ndim) for d in ([value] if isinstance(value, int) else value)]
        return (shard if shard.dim not in dims else None), {}

    return mapping


def _dropping(name: str) -> Mapping:
    """Operators that take one dimension away (`select`, `unbind`)."""

    def mapping(call: OpCall, shard: Shard) -> tuple[Shard | None, dict[str, Any]]:
        dim = wrap(call.values[name], len(call.shape("self")))
        if shard.dim == dim:
            return None, {}
        return _moved(shard, shard.dim - (shard.dim > dim)), {}

    return mapping


def _pad(call: OpCall, shard: Shard) -> tuple[Shard | None, dict[str, Any]]:
    pads = call.values["pad"]
    padded = {len(call.out) - 1 - i // 2 for i, p in enumerate(pads) if p}
    return (shard if shard.dim not in padded else None), {}


RULES: dict[str, Rule] = {
    "aten::view": _view,
    "aten::reshape": _rule("self", _reshape),
    "aten::_unsafe_view": _rule("self", _reshape),
    "aten::flatten": _rule("self", _flatten),
    "aten::unflatten": _rule("self", _unflatten),
    "aten::transpose": _rule("self", _transpose),
    "aten::swapaxes": _rule("self", _transpose),
    "aten::t": _rule("self", _t),
    "aten::numpy_T": _rule("self", _t),
    "aten::mT": _rule("self", _swap_last),
    "aten::permute": _rule("self", _permute),
    "aten::movedim": _rule("self", _movedim),
    "aten::unsqueeze": _rule("self", _unsqueeze),
    "aten::squeeze": _rule("self", _squeeze),
    "aten::expand": _rule("self", _expand),
    "aten::repeat": _rule("self", _repeat),
    "aten::repeat_interleave": _rule("self", _repeat_interleave),
    "aten::slice": _slice,
    "aten::narrow": _rule("self", _without("dim")),
    "aten::split": _rule("self", _without("dim")),
    "aten::split_with_sizes": _rule("self", _without("dim")),
    "aten::chunk": _rule("self", _without("dim")),
    "aten::tensor_split": _rule("self", _without("dim")),
    "aten::select": _rule("self", _dropping("dim")),
    "aten::unbind": _rule("self", _dropping("dim")),
    "aten::roll": _rule("self", _without("dims")),
    "aten::flip": _rule("self", _without("dims")),
    "aten::pad": _rule("self", _pad),
    "aten::constant_pad_nd": _rule("self", _pad),
}
