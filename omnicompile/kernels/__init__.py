"""Implementations of the operators that decide a step's time, and which of them runs where.

registry.py   what an implementation says of itself, and whether it is available here
table.py      all implementations, as data
choice.py     which one is taken: forced by name, measured, or the first that is available
measure.py    times on the present device, kept in a file
operators.py  normalisation, gates, rotary embeddings and losses as one operator each
"""

from __future__ import annotations

from omnicompile.kernels.choice import KernelChoice, parse_kernels
from omnicompile.kernels.registry import Kernel, Problem
from omnicompile.kernels.table import KERNELS, OPERATORS

__all__ = ["KERNELS", "OPERATORS", "Kernel", "KernelChoice", "Problem", "parse_kernels"]
