"""Along which dimension a parameter is stored in pieces."""

from __future__ import annotations

from collections.abc import Sequence


def shard_dim(shape: Sequence[int], ranks: int) -> int:
    """Of a parameter of `shape` (of a rank's own experts) that `ranks` ranks store in equal pieces.

    The first: pieces along it lie together in memory, so that a gather writes the whole parameter as it is used. Of a
    stack of matrices that would be padded more along the first dimension than along the second (128 experts on 256
    ranks twice over), the second: each gather is then copied into place.
    """
    return 1 if len(shape) > 2 and _padded(shape[1], ranks) < _padded(shape[0], ranks) else 0


def _padded(size: int, ranks: int) -> float:
    """Stored elements for each that is there."""
    return -(-size // ranks) * ranks / size
