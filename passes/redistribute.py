"""From one placement to another: the collective that does it, what it costs, and putting it into a graph."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

from torch import fx

from omnicompile.errors import LoweringError
from omnicompile.passes import collectives
from omnicompile.passes.placement import Partial, Placement, Replicate, Shard


def cost(source: Placement, target: Placement, nbytes: float, ranks: int) -> float:
    """Bytes that a rank sends for a tensor of `nbytes` (whole). Infinite where there is no way."""
    if source == target:
        return 0.0
    ragged = (isinstance(source, Shard) and source.ragged) or (isinstance(target, Shard) and target.ragged)
    if ragged:
        return math.inf
    share = nbytes * (ranks - 1) / ranks
    if isinstance(source, Replicate):
        return 0.0
    if isinstance(source, Partial):
        return share if isinstance(target, Shard) else 2 * share
    return share / ranks if isinstance(target, Shard) else share


@dataclass
class Redistributor:
    """Inserts redistributions over one axis before a node, and reuses those already there."""

    graph: fx.Graph
    ranks: int
    group: str
    rank: fx.Node
    made: dict[tuple[fx.Node, Placement], fx.Node] = field(default_factory=dict)
    origin: dict[fx.Node, tuple[fx.Node, Placement]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def convert(self, node: fx.Node, source: Placement, target: Placement, user: fx.Node) -> fx.Node:
        """`node`, which lies as `source`, as `target`; new nodes are placed before `user`."""
        if source == target:
            return node
        first, placement = self.origin.get(node, (node, source))
        if placement == target:
            return first
        key = (node, target)
        if key not in self.made:
            with self.graph.inserting_before(user):
                self.made[key] = self._insert(node, source, target)
            self.origin[self.made[key]] = (node, source)
        return self.made[key]

    def _insert(self, node: fx.Node, source: Placement, target: Placement) -> fx.Node:
        if isinstance(source, Shard) and isinstance(target, Partial):
            whole = self._emit(node, "sp_all_gather", collectives.all_gather, *self._cut(source))
            return self._emit(whole, "sp_share", collectives.share, self.ranks)
        if isinstance(source, Replicate) and isinstance(target, Shard):
            args = (target.dim, target.outer, self.ranks, self.rank)
            return self._emit(node, "sp_slice", collectives.local_slice, *args)
        if isinstance(source, Replicate) and isinstance(target, Partial):
            return self._emit(node, "sp_share", collectives.share, self.ranks)
        if isinstance(source, Shard) and isinstance(target, Shard):
            if source.dim == target.dim:
                whole = self._emit(node, "sp_all_gather", collectives.all_gather, *self._cut(source))
                args = (target.dim, target.outer, self.ranks, self.rank)
                return self._emit(whole, "sp_slice", collectives.local_slice, *args)
            where = (target.dim, target.outer, source.dim, source.outer, self.ranks, self.group)
            return self._emit(node, "sp_all_to_all", collectives.all_to_all, *where)
        if isinstance(source, Shard):
            return self._emit(node, "sp_all_gather", collectives.all_gather, *self._cut(source))
        if isinstance(target, Shard):
            return self._emit(node, "sp_reduce_scatter", collectives.reduce_scatter, *self._cut(target))
        return self._emit(node, "sp_all_reduce", collectives.all_reduce, self.group)

    def _cut(self, shard: Shard) -> tuple[int, int, int, str]:
        if shard.ragged:
            raise LoweringError(
                "rows of an expert layer are read outside the layer: their order differs from rank to rank"
            )
        return shard.dim, shard.outer, self.ranks, self.group

    def _emit(self, node: fx.Node, role: str, function: object, *args: object) -> fx.Node:
        new = self.graph.call_function(function, (node, *args))  # type: ignore[arg-type]
        new.meta = {k: copy.copy(v) for k, v in node.meta.items() if k in ("val", "nn_module_stack", "block", "seq_nr")}
        new.meta["role"] = role
        self.counts[role] = self.counts.get(role, 0) + 1
        return new
