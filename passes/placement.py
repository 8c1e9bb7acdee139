"""How a tensor lies over the ranks of one mesh axis.

The gradient convention (see docs/passes.md): the cotangent of a Replicate tensor is Partial, of a Partial one
Replicate, of a Shard the same Shard.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Replicate:
    """Every rank holds the whole tensor."""

    def __str__(self) -> str:
        return "R"


@dataclass(frozen=True)
class Shard:
    """Dimension `dim` is cut over the ranks. `outer` > 1: the dimension is a flattened (outer, rest) and `rest` is cut,
    as happens when [batch, sequence] with a cut sequence is flattened. `ragged`: ranks hold rows of their own, in an
    order of their own (rows of an expert layer); such a tensor cannot be put together again."""

    dim: int
    outer: int = 1
    ragged: bool = False

    def __str__(self) -> str:
        return f"S({self.dim}{f',outer={self.outer}' if self.outer > 1 else ''}{',ragged' if self.ragged else ''})"


@dataclass(frozen=True)
class Partial:
    """The tensor is the sum of what the ranks hold."""

    def __str__(self) -> str:
        return "P"


Placement = Replicate | Shard | Partial
REPLICATE = Replicate()
PARTIAL = Partial()


def divides(shape: Sequence[int], shard: Shard, ranks: int) -> bool:
    """Whether a tensor of this global shape can be cut like that into equal parts."""
    if shard.ragged:
        return True
    return 0 <= shard.dim < len(shape) and shape[shard.dim] % (shard.outer * ranks) == 0 and shape[shard.dim] > 0


def local_shape(shape: Sequence[int], placement: Placement, ranks: int) -> tuple[int, ...]:
    """The shape on one rank of a tensor of global shape `shape`."""
    if not isinstance(placement, Shard) or placement.ragged:
        return tuple(shape)
    return tuple(size // ranks if i == placement.dim else size for i, size in enumerate(shape))


def through_view(source: Sequence[int], target: Sequence[int], shard: Shard, ranks: int) -> Shard | None:
    """Where the cut lies after a row-major view of `source` as `target`; None if the view does not keep it in one
    place.

    The cut factor of the linear index starts after prod(source[:dim]) * outer positions; the same number must be the
    start of a factor of the target that is divisible by `ranks`.
    """
    if not divides(source, shard, ranks):
        return None
    prefix = math.prod(source[: shard.dim]) * shard.outer
    before, found = 1, None
    for dim, size in enumerate(target):
        if before > prefix:
            break
        outer = prefix // before
        if prefix % before == 0 and size > 0 and size % (outer * ranks) == 0:
            found = Shard(dim, outer)
        before *= size
    return found


def broadcast_dim(shard: Shard, ndim_from: int, ndim_to: int) -> Shard:
    """The same cut, of a tensor with `ndim_from` dimensions aligned from the right with one of `ndim_to`."""
    return Shard(shard.dim + ndim_to - ndim_from, shard.outer, shard.ragged)
