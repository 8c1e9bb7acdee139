"""Recognise traced dimensions as multiples of the workload's sizes.

The example inputs of a capture are made with sizes that hold prime factors which no model dimension holds: S tokens is
a prime, the patches of an image carry two primes of their own, the number of images another. So every traced dimension
can be read back as a multiple of exactly one of them: 4 * 20011 is 4 S and nothing else. One capture then answers every
sequence length and image size. A second capture with other primes checks this in the tests.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import sympy
from torch import Tensor

from omnicompile.program import Expr, Sym


@dataclass(frozen=True)
class GenericSize:
    """A workload symbol, its value in this capture, and the factor that marks a dimension as a multiple of it.

    unit: the share of one image or clip, for models that treat them one by one. As many such tensors exist as there are
    images in the capture, so each counts as that part of the whole. grid: (height, width) of one image in patches, for
    models that keep images in two dimensions.
    """

    symbol: sympy.Symbol
    value: int
    mark: int
    unit: int = 0
    grid: tuple[int, int] = (0, 0)


class SizeReader:
    """Turns integers of a capture into expressions. `model_dims`: dimensions of parameters, which are constants."""

    def __init__(self, sizes: Iterable[GenericSize], model_dims: Iterable[int] = ()) -> None:
        # A multiple of N is a multiple of I too: the larger mark decides.
        self.sizes = sorted((s for s in sizes if s.value > 0), key=lambda s: -s.mark)
        self.constants = frozenset(model_dims)
        self._dims: dict[int, Expr] = {}
        self._shapes: dict[tuple[int, ...], Expr] = {}

    @cached_property
    def values(self) -> dict[sympy.Symbol, int]:
        return {s.symbol: s.value for s in self.sizes}

    def dim(self, size: int) -> Expr:
        """The expression of one dimension."""
        if size not in self._dims:
            self._dims[size] = self._read(size)
        return self._dims[size]

    def _read(self, size: int) -> Expr:
        if size in self.constants or size <= 1:
            return sympy.Integer(size)
        # A loss's shift by one. Before multiples: S - 1 may well be a multiple of the number of images.
        for known in self.sizes:
            if known.symbol == Sym.S and abs(size - known.value) <= 2:
                return known.symbol + (size - known.value)
        for known in self.sizes:
            if size % known.mark == 0:
                multiple = sympy.Rational(size, known.value)
                if multiple.p % known.mark or known.mark == 1:
                    return multiple * known.symbol
                # A product of two workload sizes.
                return known.symbol * self._read(size // known.value)
        for known in self.sizes:
            if self.is_share(size, known):
                return sympy.Rational(size, known.value) * known.symbol
        return sympy.Integer(size)

    def numel(self, shape: Iterable[int]) -> Expr:
        """The expression of the number of elements."""
        key = tuple(int(d) for d in shape)
        if key not in self._shapes:
            product: Expr = sympy.Integer(1)
            for size in self._joined(key):
                product = product * self.dim(size)
            self._shapes[key] = product
        return self._shapes[key]

    def is_share(self, size: int, known: GenericSize) -> bool:
        """True for a dimension of one image or clip."""
        if not known.unit or size in self.constants or size <= 1:
            return False
        return (known.unit % size == 0 or size % known.unit == 0) and size % _odd(known.unit) == 0

    def _joined(self, shape: tuple[int, ...]) -> list[int]:
        """The dimensions; [height, width] of an image as its area, and [clips, frames of one clip] as the frames of all
        clips, which is what they are together."""
        dims = list(shape)
        for known in self.sizes:
            self._join_area(dims, known.grid)
            count = known.value // known.unit if known.unit else 0
            share = next((d for d in dims if self.is_share(d, known)), None)
            if share is not None and count in dims:
                dims.remove(count)
                dims[dims.index(share)] = count * share
        return dims

    def nbytes(self, value: object) -> Expr:
        """Bytes of a tensor, or of all tensors of a tuple."""
        if isinstance(value, Tensor):
            return self.numel(value.shape) * value.element_size()
        if isinstance(value, tuple | list):
            return sum((self.nbytes(v) for v in value), sympy.Integer(0))
        return sympy.Integer(0)

    def magnitude(self, expr: Expr) -> float:
        """The number that an expression stood for in this capture."""
        return float(expr.subs(self._all_values))

    @staticmethod
    def _join_area(dims: list[int], grid: tuple[int, int]) -> None:
        """Two neighbours in the proportion of the generic grid, which no other sizes have."""
        rows, cols = grid
        for i in range(len(dims) - 1):
            if rows and dims[i] % _odd(rows) == 0 and dims[i] * cols == dims[i + 1] * rows:
                dims[i : i + 2] = [dims[i] * dims[i + 1]]
                return

    @cached_property
    def _all_values(self) -> dict[sympy.Symbol, float]:
        values: dict[sympy.Symbol, float] = dict(self.values)
        values.setdefault(Sym.B, 1)
        tokens = values.get(Sym.S, 0)
        images, clips = values.get(Sym.I, 1), values.get(Sym.C, 1)
        values[Sym.S2] = tokens**2
        values[Sym.N2] = values.get(Sym.N, 0) ** 2 / max(images, 1)
        values[Sym.A2] = values.get(Sym.A, 0) ** 2 / max(clips, 1)
        for symbol in (Sym.S, Sym.N, Sym.I, Sym.A, Sym.C):
            values.setdefault(symbol, 0)
        return values


def _odd(number: int) -> int:
    while number % 2 == 0:
        number //= 2
    return number
