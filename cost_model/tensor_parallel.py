"""Where tensor parallelism cuts a segment: which matrix products are split by columns or rows, and what lies between.

    x --column--> inner --row--> y          forward: gather x (all-gather along the sequence, or none), sum y
                                            (reduce-scatter along the sequence, or all-reduce)
    dy --row--> inner --column--> dx        backward: the same with the roles exchanged

The roles are found by shape: the last product before the residual stream gives `width` columns again (Shoeybi et al.
2019, Korthikanti et al. 2022). They serve prices only; nothing is rewritten by them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from omnicompile.cost_model.step_layout import Groups, Split
from omnicompile.cost_model.step_numbers import ACTIVATION_BYTES, OpNumbers, SegmentNumbers
from omnicompile.cost_model.step_price import Piece, Prices
from omnicompile.program import OpKind, Phase


class Cut(StrEnum):
    NONE = "none"
    COLUMN = "column"  # enters the split part (forward), leaves it (backward)
    ROW = "row"  # leaves the split part (forward), enters it (backward)
    WEIGHT = "weight"  # gradient of a split matrix


@dataclass(frozen=True)
class Role:
    """inner: the operator works on what the split divides."""

    cut: Cut
    inner: bool


def roles(numbers: SegmentNumbers) -> tuple[Role, ...]:
    """The role of every operator of a segment."""
    if numbers.segment.role == "head":
        return tuple(_head_role(op) for op in numbers.ops)
    if numbers.segment.role != "layer":
        return (Role(Cut.NONE, False),) * len(numbers.ops)
    width = stream_width(numbers)
    forward = [op for op in numbers.ops if op.op.phase is Phase.FORWARD]
    backward = [op for op in numbers.ops if op.op.phase is Phase.BACKWARD]
    return (*_forward_roles(forward, width), *_backward_roles(backward, width))


def stream_width(numbers: SegmentNumbers) -> float:
    """Elements per token of what flows into a layer."""
    rows = [op.m for op in numbers.ops if op.op.kind is OpKind.GEMM and op.op.token_dim == "m"]
    return numbers.input_bytes / ACTIVATION_BYTES / rows[0] if rows else 0.0


def sublayers(numbers: SegmentNumbers) -> int:
    """How often a layer leaves its split part."""
    forward = [r for r, op in zip(roles(numbers), numbers.ops) if op.op.phase is Phase.FORWARD]
    return sum(role.cut is Cut.ROW for role in forward)


def _head_role(op: OpNumbers) -> Role:
    """The vocabulary is split: logits and what follows are inner, the norm before is not."""
    if op.op.kind is OpKind.GEMM:
        if op.op.token_dim == "k":
            return Role(Cut.WEIGHT, True)
        return Role(Cut.COLUMN, True)
    return Role(Cut.NONE, op.op.dtype == "float32" or op.op.target.startswith("aten._to_copy"))


def _forward_roles(ops: Sequence[OpNumbers], width: float) -> list[Role]:
    found, inner, attended = [], False, False
    for op in ops:
        if op.op.kind is OpKind.ATTENTION:
            inner = attended = True
            found.append(Role(Cut.NONE, True))
        elif op.op.kind is OpKind.GEMM:
            row = inner and op.n == width and (op.k != width or attended)
            inner, attended = not row, attended and not row
            found.append(Role(Cut.ROW if row else Cut.COLUMN, True))
        else:
            found.append(Role(Cut.NONE, inner and op.op.kind is OpKind.MEMORY))
    return found


def _backward_roles(ops: Sequence[OpNumbers], width: float) -> list[Role]:
    """Input gradients of row products come first in a backward: they give something else than the stream's width, or
    (an attention's output projection) the width itself while outside."""
    found, inner, attended = [], False, False
    for op in ops:
        if op.op.kind is OpKind.ATTENTION:
            inner = attended = True
            found.append(Role(Cut.NONE, True))
        elif op.op.kind is OpKind.GEMM and op.op.token_dim == "k":
            found.append(Role(Cut.WEIGHT, True))
        elif op.op.kind is OpKind.GEMM:
            column = op.n == width and (op.k != width or attended)
            inner = not column
            found.append(Role(Cut.COLUMN if column else Cut.ROW, True))
        else:
            attended = attended and inner
            found.append(Role(Cut.NONE, inner and op.op.kind is OpKind.MEMORY))
    return found


@dataclass(frozen=True)
class Exchange:
    """Collectives of tensor parallelism around one operator, in order."""

    before: tuple[Piece, ...] = ()
    after: tuple[Piece, ...] = ()


def exchanges(
    ops: Sequence[OpNumbers],
    cuts: Sequence[Role],
    seconds: Sequence[float],
    split: Split,
    groups: Groups,
    prices: Prices,
    width: float,
) -> dict[int, Exchange]:
    """Of a chain of operators of one phase, what some have to wait for and what follows them, by position.

    Backward: the reduction of a column product's input gradient, and the gather of its input for the weight gradient,
    run beside those products (Megatron-LM's linear layers); only what is longer than they are is left.
    """
    if groups.tensor.trivial or not width or not ops:
        return {}
    backward = ops[0].op.phase is Phase.BACKWARD
    enter, leave = (Cut.ROW, Cut.COLUMN) if backward else (Cut.COLUMN, Cut.ROW)
    parts = _parts(cuts, enter, leave)
    gather, reduce = _collectives(ops, split, groups, prices, width)
    weights = sum(s for s, role in zip(seconds, cuts) if role.cut is Cut.WEIGHT) / max(1, len(parts))
    overlapped = prices.stack.tp_overlap
    found: dict[int, Exchange] = {}
    for first, last in parts:
        before = _left(gather, seconds[first], split.tensor, overlapped)
        if backward:
            after = _left(gather + reduce, weights + seconds[last], 0, prices.stack.tp_async)
        else:
            after = _left(reduce, seconds[last], split.tensor, overlapped)
        found[first], found[last] = Exchange(before=before), Exchange(after=after)
    return found


def _parts(cuts: Sequence[Role], enter: Cut, leave: Cut) -> list[tuple[int, int]]:
    """(first operator that enters, last one that leaves) of every split part."""
    parts: list[tuple[int, int]] = []
    first, last = -1, -1
    for i, role in enumerate(cuts):
        if role.cut is enter and (first < 0 or last > first):
            if last > first >= 0:
                parts.append((first, last))
            first, last = i, -1
        elif role.cut is leave and first >= 0:
            last = i
    return [*parts, (first, last)] if last > first >= 0 else parts


def _collectives(
    ops: Sequence[OpNumbers], split: Split, groups: Groups, prices: Prices, width: float
) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """(before entering the split part, after leaving it)"""
    rows = max((op.m for op in ops if op.op.kind is OpKind.GEMM and op.op.token_dim == "m"), default=0.0)
    nbytes = rows / split.tokens * width * ACTIVATION_BYTES
    if split.tensor_sequence:
        return (
            prices.collective("all_gather", nbytes, groups.tensor),
            prices.collective("reduce_scatter", nbytes, groups.tensor),
        )
    return (), prices.collective("all_reduce", nbytes, groups.tensor)


def _left(pieces: tuple[Piece, ...], compute: float, steps: int, overlapped: bool) -> tuple[Piece, ...]:
    """What is not hidden behind `compute` seconds. steps: parts in which it runs beside it (0: all of it at once)."""
    total = sum(piece.seconds for piece in pieces)
    if not overlapped or not total:
        return pieces
    left = max(0.0, total - compute) + (min(total, compute) / steps if steps else 0.0)
    return tuple(Piece(p.stream, p.seconds * left / total, p.kind) for p in pieces)
