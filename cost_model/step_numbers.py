"""The numeric view of a Program: every symbolic size of its operators and segments, evaluated at one micro-batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import sympy

from omnicompile.program import Op, Program, Recompute, Segment

ACTIVATION_BYTES = 2
"""Of one element of an activation that is kept or exchanged."""

_FUNCTIONS: dict[type, Callable[..., float]] = {
    sympy.Add: lambda *args: math.fsum(args),
    sympy.Mul: lambda *args: math.prod(args),
    sympy.Pow: lambda base, exponent: base**exponent,
    sympy.ceiling: lambda x: float(math.ceil(x)),
    sympy.floor: lambda x: float(math.floor(x)),
    sympy.Max: max,
    sympy.Min: min,
    sympy.Mod: lambda a, b: a % b,
}


class Evaluator:
    """Evaluates many expressions at once; common subexpressions are computed once.

    Building it takes microseconds per node, where `sympy.lambdify` of a whole program takes most of a second.
    """

    def __init__(self, expressions: Sequence[sympy.Expr]) -> None:
        self._index: dict[sympy.Expr, int] = {}
        self._steps: list[tuple[Callable[..., float] | None, tuple[int, ...], sympy.Expr]] = []
        self._outputs = [self._add(sympy.sympify(e)) for e in expressions]

    def _add(self, expr: sympy.Expr) -> int:
        known = self._index.get(expr)
        if known is not None:
            return known
        function = _FUNCTIONS.get(expr.func)
        if function is None and expr.args:
            symbols = sorted(expr.free_symbols, key=str)
            function, arguments = sympy.lambdify(symbols, expr, "math"), tuple(self._add(s) for s in symbols)
        else:
            arguments = tuple(self._add(a) for a in expr.args) if expr.args else ()
        self._steps.append((function if expr.args else None, arguments, expr))
        self._index[expr] = len(self._steps) - 1
        return self._index[expr]

    def __call__(self, values: dict[sympy.Symbol, float]) -> list[float]:
        results: list[float] = []
        for function, arguments, expr in self._steps:
            if function is not None:
                results.append(function(*[results[a] for a in arguments]))
            else:
                results.append(float(values[expr]) if expr.is_Symbol else float(expr))
        return [results[i] for i in self._outputs]


@dataclass(frozen=True)
class OpNumbers:
    """An operator with numbers for one micro-batch before any parallelism. FLOPs, bytes and dimensions as in `Op`."""

    op: Op
    flops: float
    activation_bytes: float
    param_bytes: float
    m: float = 0.0
    n: float = 0.0
    k: float = 0.0
    batch: float = 1.0
    q_tokens: float = 0.0
    kv_tokens: float = 0.0
    pairs: float = 0.0
    tokens: float = 0.0


@dataclass(frozen=True)
class SegmentNumbers:
    """One instance of a segment for one micro-batch. All sizes in bytes except `logit_rows` (tokens). backward: by
    policy, temporaries and what is freed at each of the segment's backward points."""

    segment: Segment
    ops: tuple[OpNumbers, ...]
    saved: dict[Recompute, float]
    saved_frozen: dict[Recompute, float]
    input_bytes: float
    output_bytes: float
    forward_peak: float
    backward: dict[Recompute, tuple[tuple[float, float], ...]]
    logit_rows: float


@dataclass(frozen=True)
class MicroBatchNumbers:
    """The whole program for one micro-batch: segments by name, bytes per edge in the order of `Program.edges`, and the
    number of work items (images, clips) per block."""

    segments: dict[str, SegmentNumbers]
    edges: tuple[float, ...]
    units: dict[str, float]


class ProgramNumbers:
    """Evaluates `program` at any micro-batch, each once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        expressions: list[sympy.Expr] = []
        for segment in program.segments:
            expressions += _segment_expressions(segment)
            for op in segment.ops:
                expressions += _op_expressions(op)
        expressions += [edge.nbytes for edge in program.edges]
        self._evaluate = Evaluator(expressions)
        self._cache: dict[int, MicroBatchNumbers] = {}

    def at(self, micro_batch: int) -> MicroBatchNumbers:
        """Numbers for a micro-batch of `micro_batch` samples."""
        if micro_batch not in self._cache:
            self._cache[micro_batch] = self._compute(micro_batch)
        return self._cache[micro_batch]

    def _compute(self, micro_batch: int) -> MicroBatchNumbers:
        values = self.program.symbol_values(micro_batch)
        numbers = iter(self._evaluate(values))
        segments = {s.name: _read_segment(s, numbers) for s in self.program.segments}
        by_name = {symbol.name: value for symbol, value in values.items()}
        units = {b.name: float(by_name.get(b.units, 0.0)) for b in self.program.blocks}
        return MicroBatchNumbers(segments, tuple(next(numbers) for _ in self.program.edges), units)


_POLICIES = tuple(Recompute)


def _segment_expressions(segment: Segment) -> list[sympy.Expr]:
    saved = [segment.saved[p] for p in _POLICIES]
    rows = segment.logits[0] if segment.logits else sympy.Integer(0)
    return (
        [s.nbytes for s in saved]
        + [s.nbytes_frozen for s in saved]
        + [segment.input_bytes, segment.output_bytes, segment.forward_peak, rows]
        + [n for p in _POLICIES for point in segment.backward for n in (point.held(p).temporaries, point.held(p).freed)]
    )


def _op_expressions(op: Op) -> list[sympy.Expr]:
    zero, one = sympy.Integer(0), sympy.Integer(1)
    gemm = [op.gemm.m, op.gemm.n, op.gemm.k, op.gemm.batch] if op.gemm else [zero, zero, zero, one]
    attention = (
        [op.attention.q_tokens, op.attention.kv_tokens, op.attention.pairs] if op.attention else [zero, zero, zero]
    )
    tokens = op.experts.tokens if op.experts else zero
    return [op.flops, op.activation_bytes, op.param_bytes, *gemm, *attention, tokens]


def _read_segment(segment: Segment, numbers: Iterator[float]) -> SegmentNumbers:
    saved = {p: next(numbers) for p in _POLICIES}
    saved_frozen = {p: next(numbers) for p in _POLICIES}
    inputs, outputs, forward, rows = (next(numbers) for _ in range(4))
    backward = {p: tuple((next(numbers), next(numbers)) for _ in segment.backward) for p in _POLICIES}
    ops = tuple(OpNumbers(op, *(next(numbers) for _ in range(11))) for op in segment.ops)
    return SegmentNumbers(segment, ops, saved, saved_frozen, inputs, outputs, forward, backward, rows)
