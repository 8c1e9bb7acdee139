"""Reading and writing by index. A dimension that is not indexed may be cut; if the cut one is indexed, the tensor is
cut along another dimension for the operator and brought back after it (sequence-cut -> hidden-cut -> scatter ->
back)."""

from __future__ import annotations

import torch
from torch import fx

from omnicompile.passes.placement import REPLICATE, Placement, Shard, broadcast_dim
from omnicompile.passes.rules.base import Choice, OpCall, Required, Rule, candidate_shards, node_shape, wrap


def _home(call: OpCall, name: str) -> Placement | None:
    """The present cut of an argument, if the output may have it too."""
    present = call.shard(name)
    if present is None or present.ragged or not call.fits(call.out, present):
        return None
    return present if len(call.out) == len(call.shape(name)) else None


def _positions(call: OpCall) -> tuple[list[fx.Node], list[int], tuple[int, ...]] | None:
    """Index tensors, the dimensions they index, and the shape they broadcast to; None with boolean masks."""
    nodes, dims = [], []
    for dim, item in enumerate(call.values["indices"]):
        if isinstance(item, fx.Node):
            if item.meta["val"].dtype in (torch.bool, torch.uint8):
                return None
            nodes.append(item)
            dims.append(dim)
    return nodes, dims, tuple(torch.broadcast_shapes(*(node_shape(n) for n in nodes)))


def _place_of_index(dims: list[int]) -> int:
    """Where the index dimensions land in the result: in place if the indexed dimensions are neighbours, else first."""
    return dims[0] if dims == list(range(dims[0], dims[0] + len(dims))) else 0


def _kept(dim: int, dims: list[int], width: int) -> int:
    """Where an unindexed dimension lands in the result."""
    first = _place_of_index(dims)
    before = dim - sum(d < dim for d in dims)
    return before + width if before >= first else before


def index(call: OpCall) -> list[Choice]:
    found = _positions(call)
    if found is None:
        return []
    nodes, dims, broadcast = found
    home = _home(call, "self")
    choices = []
    for shard in candidate_shards(call, "self"):
        if shard.dim not in dims:
            target = Shard(_kept(shard.dim, dims, len(broadcast)), shard.outer, shard.ragged)
            back = home if home is not None and home != target else None
            choices.append(Choice({"self": shard}, (target,), restore=back))
    for node in nodes:
        placement = call.placements[node]
        if not isinstance(placement, Shard) or placement.ragged:
            continue
        inner = broadcast_dim(placement, len(node_shape(node)), len(broadcast))
        required: list[Placement] = []
        for other in nodes:
            shape = node_shape(other)
            own = broadcast_dim(inner, len(broadcast), len(shape))
            has = own.dim >= 0 and shape[own.dim] == broadcast[inner.dim]
            required.append(own if has else REPLICATE)
        target = Shard(inner.dim + _place_of_index(dims), inner.outer)
        if call.fits(call.out, target):
            choices.append(Choice({"indices": tuple(required)}, (target,)))
    return choices


def _written_dims(call: OpCall) -> tuple[list[int], int] | None:
    """The dimensions that `index_put` indexes and how many the indices have; a boolean mask stands for one index."""
    items = call.values["indices"]
    if items and isinstance(items[0], fx.Node) and items[0].meta["val"].dtype == torch.bool and len(items) == 1:
        return list(range(len(node_shape(items[0])))), 1
    found = _positions(call)
    return None if found is None else (found[1], len(found[2]))


def index_put(call: OpCall) -> list[Choice]:
    found = _written_dims(call)
    if found is None:
        return []
    dims, width = found
    home = _home(call, "self")
    result_dims = len(call.out) - len(dims) + width
    choices = []
    for shard in candidate_shards(call, "self"):
        if shard.dim in dims or shard.ragged:
            continue
        inside = Shard(_kept(shard.dim, dims, width), shard.outer)
        shape = call.shape("values")
        own = broadcast_dim(inside, result_dims, len(shape))
        has = own.dim >= 0 and shape[own.dim] == call.out[shard.dim]
        values: Required = own if has else REPLICATE
        back = home if home is not None and home != shard else None
        choices.append(Choice({"self": shard, "values": values}, (shard,), restore=back))
    return choices


def index_select(call: OpCall) -> list[Choice]:
    dim = wrap(call.values["dim"], len(call.out))
    home = _home(call, "self")
    choices = []
    for shard in candidate_shards(call, "self"):
        if shard.dim != dim:
            choices.append(Choice({"self": shard}, (shard,), restore=home if home != shard else None))
    position = call.shard("index")
    if position is not None:
        choices.append(Choice({"index": position}, (Shard(dim, position.outer, position.ragged),)))
    return choices


def _same_size(call: OpCall, names: tuple[str, ...], dim: int) -> bool:
    return all(call.shape(name)[dim] == call.shape("self")[dim] for name in names)


def gather(call: OpCall) -> list[Choice]:
    ndim = len(call.out)
    dim = wrap(call.values["dim"], ndim)
    choices = []
    for name in ("self", "index"):
        for shard in candidate_shards(call, name):
            if shard.dim != dim and _same_size(call, ("index",), shard.dim):
                choices.append(Choice({"self": shard, "index": shard}, (shard,)))
    position = call.shard("index")
    if position is not None and position.dim == dim:
        choices.append(Choice({"index": position}, (position,)))
    return choices


def scatter(call: OpCall) -> list[Choice]:
    """scatter, scatter_add, scatter_reduce: along dimensions other than the indexed one."""
    dim = wrap(call.values["dim"], len(call.out))
    names = tuple(n for n in ("index", "src") if call.has(n))
    choices = []
    for anchor in ("self", *names):
        for shard in candidate_shards(call, anchor):
            if shard.dim != dim and _same_size(call, names, shard.dim):
                choices.append(Choice({"self": shard, **dict.fromkeys(names, shard)}, (shard,)))
    return choices


def index_add(call: OpCall) -> list[Choice]:
    dim = wrap(call.values["dim"], len(call.out))
    home = _home(call, "self")
    return [
        Choice({"self": shard, "source": shard}, (shard,), restore=home if home != shard else None)
        for shard in candidate_shards(call, "self")
        if shard.dim != dim and not shard.ragged
    ]


def slice_scatter(call: OpCall) -> list[Choice]:
    """A slice (or one index, for select_scatter) of `self` replaced by `src`: along dimensions other than the sliced
    one."""
    dim = wrap(call.values["dim"], len(call.out))
    choices = []
    for anchor in ("self", "src"):
        for shard in candidate_shards(call, anchor):
            own = shard if anchor == "self" or call.name == "slice_scatter" else Shard(shard.dim + (shard.dim >= dim))
            source = own if call.name == "slice_scatter" else Shard(own.dim - (own.dim > dim), own.outer)
            if own.dim != dim and call.fits(call.out, own):
                choices.append(Choice({"self": own, "src": source}, (own,)))
    return choices


_TRANSPARENT = frozenset(
    {"aten::to", "aten::_to_copy", "aten::alias", "aten::clone", "aten::contiguous", "aten::detach"}
)


def _constant_along_last(value: object) -> bool:
    """Whether a mask is an expansion of one with a last dimension of 1, so that it masks whole rows."""
    node = value
    while isinstance(node, fx.Node) and node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        source = node.args[0]
        name = node.target._schema.name
        if name in ("aten::expand", "aten::expand_as") and isinstance(source, fx.Node):
            return node_shape(source)[-1:] == (1,) or _constant_along_last(source)
        if name not in _TRANSPARENT:
            return False
        node = source
    return False


def masked_scatter(call: OpCall) -> list[Choice]:
    """Rows of `source` go to the rows of `self` that the mask names, in order: with the hidden dimension cut
    everywhere, each rank scatters its own columns."""
    shape, source, mask = call.out, call.shape("source"), call.shape("mask")
    last = len(shape) - 1
    rows = mask[-1] == 1 or _constant_along_last(call.values["mask"])
    if not rows or not source or source[-1] != shape[-1] or not call.fits(shape, Shard(last)):
        return []
    masked: Required = REPLICATE if mask[-1] == 1 else Shard(len(mask) - 1)
    home = _home(call, "self")
    inputs: dict[str, Required] = {"self": Shard(last), "mask": masked, "source": Shard(len(source) - 1)}
    return [Choice(inputs, (Shard(last),), restore=home if home != Shard(last) else None)]


RULES: dict[str, Rule] = {
    "aten::index": index,
    "aten::index_put": index_put,
    "aten::index_select": index_select,
    "aten::gather": gather,
    "aten::take_along_dim": gather,
    "aten::scatter": scatter,
    "aten::scatter_add": scatter,
    "aten::scatter_reduce": scatter,
    "aten::slice_scatter": slice_scatter,
    "aten::select_scatter": slice_scatter,
    "aten::index_add": index_add,
    "aten::index_copy": index_add,
    "aten::masked_scatter": masked_scatter,
}
