"""Query-key pairs of an attention call as an expression of the workload."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
from torch import Tensor

from omnicompile.capture.symbols import SizeReader
from omnicompile.program import Expr, Sym

_SQUARES = {Sym.S: Sym.S2, Sym.N: Sym.N2, Sym.A: Sym.A2}


def attention_pairs(
    reader: SizeReader,
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    bounds: tuple[Tensor | None, ...],
    window: int,
) -> Expr:
    """Sum over segments of q_len * kv_len, not counting a causal mask.

    bounds: cu_seqlens of queries and keys where they are known constants. A sliding window of w keys per query counts
    as 2 * w * tokens pairs, so that the causal half of it is what is computed.
    """
    q_len, kv_len = reader.dim(q_shape[2]), reader.dim(k_shape[2])
    cu_q, cu_k = bounds
    if cu_q is not None and cu_k is not None:
        pairs = _segmented(reader, q_len, cu_q, cu_k)
    else:
        pairs = _one_by_one(reader, q_shape[0], q_shape[2], k_shape[2])
        pairs = _batched(reader.dim(q_shape[0]), q_len, kv_len) if pairs is None else pairs
    if window > 0:
        return sympy.Min(pairs, 2 * window * reader.dim(q_shape[0]) * q_len)
    return pairs


def _one_by_one(reader: SizeReader, batch: int, q_len: int, kv_len: int) -> Expr | None:
    """One image or clip per batch row."""
    for known in reader.sizes:
        square = _SQUARES.get(known.symbol)
        one_a_row = known.unit and batch == known.value // known.unit
        if square is not None and one_a_row and reader.is_share(q_len, known) and reader.is_share(kv_len, known):
            return sympy.Rational(q_len * kv_len, known.unit**2) * square
    return None


def _batched(batch: Expr, q_len: Expr, kv_len: Expr) -> Expr:
    """One segment per batch row. S * S is the sum of squared segment lengths: packed samples do not see one another."""
    for symbol, square in _SQUARES.items():
        if q_len.free_symbols == {symbol} and kv_len.free_symbols == {symbol} and not batch.free_symbols:
            return batch * sympy.cancel(q_len * kv_len / symbol**2) * square
    if q_len.free_symbols and kv_len.free_symbols:
        # Cross attention between two packed sequences: each sample sees its own part.
        return batch * q_len * kv_len / Sym.B
    return batch * q_len * kv_len


def _segmented(reader: SizeReader, q_tokens: Expr, cu_q: Tensor, cu_k: Tensor) -> Expr:
    """As many segments as images (or clips): their sum of squares. More are windows of fixed size, one is everything.

    The last window of an image may be smaller: with more windows that counts for ever less, and is left out.
    """
    q_lens = [n for n in cu_q.diff().tolist() if n]
    k_lens = [n for n in cu_k.diff().tolist() if n]
    if not q_lens or not k_lens:
        return sympy.Integer(0)
    for symbol, square in _SQUARES.items():
        if symbol not in q_tokens.free_symbols:
            continue
        units = _units(reader, symbol)
        unit = reader.values[symbol] // units
        if len(q_lens) == units:
            return sympy.Rational(sum(a * b for a, b in zip(q_lens, k_lens)), units * unit**2) * square
        if len(q_lens) == 1:
            return q_tokens * sympy.Rational(k_lens[0], reader.values[symbol]) * symbol
    return q_tokens * max(k_lens)


def _units(reader: SizeReader, symbol: sympy.Symbol) -> int:
    """Images or clips of the capture; 1 for text, which is one sample."""
    count = {Sym.N: Sym.I, Sym.A: Sym.C}.get(symbol)
    return reader.values.get(count, 1) if count is not None else 1
