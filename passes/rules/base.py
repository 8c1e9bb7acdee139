"""What a rule sees (an operator call with the placements of its tensors) and what it answers (possible choices).

A rule lists ways to run the operator on each rank's pieces. Running it whole everywhere (all inputs Replicate) is
always added by the engine, which takes the choice that needs the least communication.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from omnicompile.passes.placement import PARTIAL, REPLICATE, Partial, Placement, Shard, broadcast_dim, divides
from omnicompile.plan import Layout

RANK = "this rank's number"  # among the arguments of `Choice.prepare`

# One placement per tensor of an argument; a list of tensors has a tuple.
Required = Placement | tuple[Placement, ...]


@dataclass(frozen=True)
class Choice:
    """One way to run an operator.

    inputs: by argument name; tensors not named must be Replicate. outputs: of every output (one for a single output; a
    single one for many stands for all). args: arguments to change, to local sizes for instance (RANK stands for
    this rank's number). restore: bring the
    output to this placement right away. scale: what the (single) output must be multiplied by on each rank. prepare:
    replaces a tensor argument by a function of it and the given further arguments (RANK stands for this rank's number)
    before it is redistributed. aligned: segment bounds that must include the borders between ranks' pieces, of the
    given size.
    """

    inputs: Mapping[str, Required]
    outputs: tuple[Placement, ...]
    args: Mapping[str, Any] = field(default_factory=dict)
    restore: Placement | None = None
    scale: float = 1.0
    prepare: Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]] = field(default_factory=dict)
    aligned: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class OpCall:
    """A call of an operator on one mesh axis of `ranks` ranks. `name`: without namespace. `values`: arguments by name
    with defaults filled in, tensors as graph nodes. `placements`: what each tensor node has (or could have for
    nothing, see propagate.py). `layout`: of the block."""

    node: fx.Node
    name: str
    values: Mapping[str, Any]
    placements: Mapping[fx.Node, Placement]
    ranks: int
    layout: Layout = Layout.SEQUENCE

    def placement(self, name: str) -> Placement:
        value = self.values.get(name)
        return self.placements[value] if isinstance(value, fx.Node) else REPLICATE

    def shard(self, name: str) -> Shard | None:
        found = self.placement(name)
        return found if isinstance(found, Shard) else None

    def shape(self, name: str) -> tuple[int, ...]:
        return node_shape(self.values[name])

    def has(self, name: str) -> bool:
        return isinstance(self.values.get(name), fx.Node)

    @property
    def out(self) -> tuple[int, ...]:
        return node_shape(self.node)

    @property
    def outs(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of all outputs."""
        value = self.node.meta["val"]
        return tuple(tuple(v.shape) for v in (value if isinstance(value, tuple | list) else (value,)))

    def tensors(self) -> list[tuple[str, fx.Node]]:
        """Tensor arguments by name, those of lists too."""
        found: list[tuple[str, fx.Node]] = []
        for name, value in self.values.items():
            for item in value if isinstance(value, tuple | list) else (value,):
                if isinstance(item, fx.Node) and isinstance(item.meta.get("val"), torch.Tensor):
                    found.append((name, item))
        return found

    def fits(self, shape: Sequence[int], shard: Shard) -> bool:
        return divides(shape, shard, self.ranks)


Rule = Callable[[OpCall], list[Choice]]


def node_shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def wrap(dim: int, ndim: int) -> int:
    return dim % ndim if ndim else 0


def follow(name: str, *, batch_dims: Callable[[OpCall], set[int]]) -> Rule:
    """A rule for operators with one tensor that keep the cut of any dimension in `batch_dims` (shape-preserving
    there)."""

    def rule(call: OpCall) -> list[Choice]:
        allowed = batch_dims(call)
        return [
            Choice({name: shard}, (shard,))
            for shard in candidate_shards(call, name)
            if shard.dim in allowed and all(call.fits(out, shard) for out in call.outs)
        ]

    return rule


def candidate_shards(call: OpCall, name: str) -> list[Shard]:
    """Cuts of an argument that are worth looking at: the present one first, then every plain one that divides."""
    present = call.shard(name)
    shape = call.shape(name)
    found = [present] if present is not None else []
    if present is not None and present.ragged:
        return found
    for dim in range(len(shape)):
        shard = Shard(dim)
        if shard not in found and call.fits(shape, shard):
            found.append(shard)
    return found


def aligned(call: OpCall, target: Shard, out: Sequence[int]) -> dict[str, Required] | None:
    """What broadcasting inputs must be for an output cut as `target`: those that have the dimension are cut, the others
    (size 1, or fewer dimensions) are whole."""
    required: dict[str, Any] = {}
    for name, value in call.values.items():
        items = value if isinstance(value, tuple | list) else (value,)
        found: list[Placement] = []
        for item in items:
            if not isinstance(item, fx.Node) or not isinstance(item.meta.get("val"), torch.Tensor):
                continue
            shape = node_shape(item)
            own = broadcast_dim(target, len(out), len(shape))
            if own.dim < 0 or shape[own.dim] != out[target.dim]:
                if own.dim >= 0 and shape[own.dim] != 1:
                    return None
                found.append(REPLICATE)
            else:
                found.append(own)
        if found:
            required[name] = tuple(found) if isinstance(value, tuple | list) else found[0]
    return required


def output_targets(call: OpCall) -> list[Shard]:
    """Cuts of the output of a broadcasting operator that its inputs suggest."""
    targets: list[Shard] = []
    for _, node in call.tensors():
        placement = call.placements[node]
        if isinstance(placement, Shard):
            target = broadcast_dim(placement, len(node_shape(node)), len(call.out))
            if target not in targets:
                targets.append(target)
    return targets


def is_partial(placement: Placement) -> bool:
    return isinstance(placement, Partial)


__all__ = [
    "PARTIAL", "RANK", "REPLICATE", "Choice", "OpCall", "Required", "Rule", "aligned", "candidate_shards", "follow",
    "is_partial", "node_shape", "output_targets", "wrap",
]  # fmt: skip
