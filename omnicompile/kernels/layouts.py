"""Layouts of rotary embeddings."""

from __future__ import annotations


def heads_dim(x: tuple[int, ...], table: tuple[int, ...]) -> int | None:
    """The dimension of heads: the one of the two before the last that the table [..., d] does not have. None where the
    Triton kernel has no such layout."""
    if len(x) not in (3, 4) or len(table) != len(x) or table[-1] != x[-1]:
        return None
    for dim, sequence in ((len(x) - 3, len(x) - 2), (len(x) - 2, len(x) - 3)):
        if table[dim] == 1 and table[sequence] == x[sequence]:
            return dim
    return None
