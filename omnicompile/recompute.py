"""How much of a block's forward is run again in its backward (a file of its own, so that plans load without sympy)."""

from enum import StrEnum


class Recompute(StrEnum):
    """From keeping most to keeping least; each runs again all that the one before it does."""

    NONE = "none"  # keep every tensor that the backward reads
    SELECTIVE = "selective"  # keep results of GEMMs, attention and experts; recompute what is cheap
    EXCEPT_ATTENTION = "except_attention"  # keep the segment's inputs and the results of attention
    FULL = "full"  # keep the segment's inputs only
