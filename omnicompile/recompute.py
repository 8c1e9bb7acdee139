"""How much of a block's forward is run again in its backward (a file of its own, so that plans load without sympy)."""

from enum import StrEnum


class Recompute(StrEnum):
    NONE = "none"  # keep every tensor that the backward reads
    SELECTIVE = "selective"  # keep results of GEMMs, attention and experts; recompute what is cheap
    FULL = "full"  # keep the segment's inputs only
