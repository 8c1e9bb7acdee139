"""Attention and experts.

Attention needs whole sequences: with the sequence cut, queries, keys and values are re-cut along heads by an
all-to-all, and the output is cut along the sequence again (Ulysses). cu_seqlens stay valid, since every rank then sees
the whole sequence for its heads. Key and value heads are repeated up to a multiple of the number of ranks where they
do not divide.

The rows of an expert layer are `ragged`: each rank's own rows in its own order.
"""

from __future__ import annotations

import math

from torch import Tensor, fx

from omnicompile.anchors import attention as _attention  # noqa: F401  (defines the operator)
from omnicompile.errors import LoweringError
from omnicompile.passes.placement import PARTIAL, REPLICATE, Placement, Shard
from omnicompile.passes.rules.base import RANK, Choice, OpCall, Required, Rule
from omnicompile.plan import Layout

_HEADS, _SEQUENCE = Shard(1), Shard(2)
_RAGGED = Shard(0, ragged=True)


def repeat_heads(x: Tensor, times: int) -> Tensor:
    """[batch, heads, s, d] -> [batch, heads * times, s, d], every head `times` times in a row."""
    return x.repeat_interleave(times, dim=1)


def _head_repeats(call: OpCall, query: str, key: str) -> int:
    """How often key heads are repeated before heads are cut. Raises LoweringError if query heads do not divide."""
    heads, kv_heads = call.shape(query)[1], call.shape(key)[1]
    if heads % call.ranks:
        raise LoweringError(
            f"sequence parallelism over sp={call.ranks} cuts {heads} attention heads, which do not divide "
            f"(at {_module_of(call)}): choose an sp that divides {heads}"
        )
    return math.lcm(kv_heads, call.ranks) // kv_heads


def _module_of(call: OpCall) -> str:
    stack = call.node.meta.get("nn_module_stack") or {}
    return next((path for path, _ in reversed(list(stack.values()))), call.node.name) or call.node.name


def _head_cut(call: OpCall, names: tuple[str, str, str], extra: dict[str, Required], outputs: int) -> list[Choice]:
    query, key, value = names
    present = [call.shard(name) for name in names]
    if not any(p is not None and p.dim != 0 for p in present):
        return []
    repeats = _head_repeats(call, query, key)
    back: Placement | None = call.shard(query) if call.shard(query) != _HEADS else None
    inputs: dict[str, Required] = {query: _HEADS, **extra}
    if repeats == 1:
        return [Choice({**inputs, key: _HEADS, value: _HEADS}, (_HEADS,) * outputs, restore=back)]
    prepare = {key: (repeat_heads, (repeats,)), value: (repeat_heads, (repeats,))}
    return [Choice({**inputs, key: _HEADS, value: _HEADS}, (_HEADS,) * outputs, restore=back, prepare=prepare)]


def _batch_cut(call: OpCall, names: tuple[str, str, str], extra: dict[str, Required], outputs: int) -> list[Choice]:
    if not call.fits(call.shape(names[0]), Shard(0)):
        return []
    return [Choice({**{name: Shard(0) for name in names}, **extra}, (Shard(0),) * outputs)]


def local_bounds(bounds: Tensor, size: int, rank: Tensor) -> Tensor:
    """Segment bounds within this rank's `size` positions; segments of other ranks become empty."""
    return (bounds - rank.to(bounds.dtype) * size).clamp(0, size)


def _whole_segments(call: OpCall) -> list[Choice]:
    """Every rank has whole images (segments): attention needs no communication. Whether the borders between ranks are
    borders of segments is a property of the batch, checked when it is prepared (`check_alignment`)."""
    bounds = [call.values["cu_q"], call.values["cu_k"]]
    if call.layout is not Layout.IMAGES or any(not isinstance(b, fx.Node) or b.op != "placeholder" for b in bounds):
        return []
    sizes = {name: call.shape(name)[2] // call.ranks for name in ("q", "k")}
    if any(not call.fits(call.shape(name), _SEQUENCE) for name in ("q", "k", "v")):
        return []
    inputs: dict[str, Required] = {"q": _SEQUENCE, "k": _SEQUENCE, "v": _SEQUENCE}
    prepare = {"cu_q": (local_bounds, (sizes["q"], RANK)), "cu_k": (local_bounds, (sizes["k"], RANK))}
    aligned = {"cu_q": sizes["q"], "cu_k": sizes["k"]}
    return [Choice(inputs, (_SEQUENCE, _SEQUENCE), prepare=prepare, aligned=aligned)]


def attention(call: OpCall) -> list[Choice]:
    names = ("q", "k", "v")
    whole = _whole_segments(call)
    if whole and not call.has("sinks"):
        return whole
    sinks: dict[str, Required] = {"sinks": Shard(0)} if call.has("sinks") else {}
    choices = _head_cut(call, names, sinks, 2)
    if not call.has("cu_q"):
        choices += _batch_cut(call, names, {}, 2)
    return choices


def sdpa(call: OpCall) -> list[Choice]:
    names = ("query", "key", "value")
    if len(call.out) != 4:
        return []
    by_head: dict[str, Required] = {}
    by_batch: dict[str, Required] = {}
    if call.has("attn_mask"):
        mask = call.shape("attn_mask")
        by_head["attn_mask"] = _HEADS if len(mask) == 4 and mask[1] > 1 else REPLICATE
        by_batch["attn_mask"] = Shard(0) if len(mask) == 4 and mask[0] > 1 else REPLICATE
    return _head_cut(call, names, by_head, 1) + _batch_cut(call, names, by_batch, 1)


def dispatch(call: OpCall) -> list[Choice]:
    """Tokens cut any way -> the rank's own rows; counts add up."""
    tokens = call.shard("x") or call.shard("index")
    if tokens is None or tokens.dim != 0:
        return [Choice({"x": s, "index": s}, (_RAGGED, _RAGGED, PARTIAL)) for s in _token_cuts(call)]
    return [Choice({"x": tokens, "index": tokens}, (_RAGGED, _RAGGED, PARTIAL))]


def _token_cuts(call: OpCall) -> list[Shard]:
    return [s for s in (Shard(0),) if call.shard("x") is not None and call.fits(call.shape("x"), s)]


def grouped_mm(call: OpCall) -> list[Choice]:
    """Rows and counts are the rank's own."""
    return [Choice({"rows": _RAGGED, "counts": call.placement("counts")}, (_RAGGED,))] if _ragged(call, "rows") else []


def expert_bias(call: OpCall) -> list[Choice]:
    own = isinstance(call.placement("counts"), type(PARTIAL))
    rows = {"rows": call.values["rows"] // call.ranks}
    return [Choice({"counts": PARTIAL}, (_RAGGED,), rows)] if own else []


def _ragged(call: OpCall, name: str) -> bool:
    shard = call.shard(name)
    return shard is not None and shard.ragged


def combine(call: OpCall) -> list[Choice]:
    """Rows back to the tokens that they came from: the output lies as the routing weights do."""
    weight = call.shard("weight")
    if not _ragged(call, "rows") or weight is None:
        return []
    return [Choice({"rows": _RAGGED, "order": _RAGGED, "weight": weight}, (weight,))]


RULES: dict[str, Rule] = {
    "omnicompile::attention": attention,
    "aten::scaled_dot_product_attention": sdpa,
    "omnicompile::expert_dispatch": dispatch,
    "omnicompile::grouped_mm": grouped_mm,
    "omnicompile::expert_bias": expert_bias,
    "omnicompile::expert_combine": combine,
}
