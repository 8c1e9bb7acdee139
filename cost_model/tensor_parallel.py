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
    role = numbers.segment.role
    if role == "head":
        return tuple(_head_role(op) for op in numbers.ops)
    if role != "layer":  # an embedding's table is split by vocabulary
        return (Role(Cut.NONE, role == "embed"),) * len(numbers.ops)
    width = stream_width(numbers)
    routers = {float(op.op.experts.experts) for op in numbers.ops if op.op.experts is not None}
    forward = [op for op in numbers.ops if op.op.phase is Phase.FORWARD]
    backward = [op for op in numbers.ops if op.op.phase is Phase.BACKWARD]
    found = _forward_roles(forward, width, routers)
    return (*found, *_backward_roles(backward, list(zip(forward, found))))


def stream_width(numbers: SegmentNumbers) -> float:
    """Elements per token of what flows out of a layer (into a loss head)."""
    rows = [op.m for op in numbers.ops if op.op.kind is OpKind.GEMM and op.op.token_dim == "m"]
    nbytes = numbers.input_bytes if numbers.segment.role == "head" else numbers.output_bytes
    return nbytes / ACTIVATION_BYTES / rows[0] if rows and rows[0] else 0.0


def sublayers(numbers: SegmentNumbers) -> int:
    """How often a layer leaves its split part."""
    forward = [r for r, op in zip(roles(numbers), numbers.ops) if op.op.phase is Phase.FORWARD]
    return sum(role.cut is Cut.ROW for role in forward)


def _head_role(op: OpNumbers) -> Role:
    """The vocabulary is split: logits and what follows are inner, the norm before is not."""
    if op.op.kind is OpKind.GEMM:
        return Role(Cut.WEIGHT if op.op.token_dim == "k" else Cut.COLUMN, True)
    return Role(Cut.NONE, op.op.dtype == "float32" or op.op.target.startswith("aten._to_copy"))


def _forward_roles(ops: Sequence[OpNumbers], width: float, routers: set[float]) -> list[Role]:
    """routers: numbers of experts; a product with as many columns is a router, which every rank runs on its rows."""
    found, inner, attended = [], False, False
    for op in ops:
        if op.op.kind is OpKind.ATTENTION:
            inner = attended = True
            found.append(Role(Cut.NONE, True))
        elif op.op.kind is OpKind.GEMM and op.n in routers:
            found.append(Role(Cut.NONE, False))
        elif op.op.kind is OpKind.GEMM:
            row = inner and op.n == width and (op.k != width or attended)
            inner, attended = not row, attended and not row
            found.append(Role(Cut.ROW if row else Cut.COLUMN, True))
        else:
            found.append(Role(Cut.NONE, inner and op.op.kind is OpKind.MEMORY))
    return found


def _backward_roles(ops: Sequence[OpNumbers], forward: list[tuple[OpNumbers, Role]]) -> list[Role]:
    """An input gradient has the role of the forward product whose dimensions it exchanges, the latest one first."""
    products = [(op, role) for op, role in forward if op.op.kind is OpKind.GEMM]
    found, inner = [], False
    for op in ops:
        if op.op.kind is OpKind.ATTENTION:
            inner = True
            found.append(Role(Cut.NONE, True))
        elif op.op.kind is OpKind.GEMM and op.op.token_dim == "k":
            found.append(Role(Cut.WEIGHT, True))
        elif op.op.kind is OpKind.GEMM:
            role = _taken(op, products)
            inner = role.cut is Cut.ROW or (inner and role.cut is Cut.NONE)
            found.append(role)
        else:
            found.append(Role(Cut.NONE, inner and op.op.kind is OpKind.MEMORY))
    return found


def _taken(op: OpNumbers, products: list[tuple[OpNumbers, Role]]) -> Role:
    """The role of the last of `products` whose input gradient `op` may be; that one is removed."""
    for i in range(len(products) - 1, -1, -1):
        product, role = products[i]
        if (product.n, product.k) == (op.k, op.n):
            del products[i]
            return role
    return Role(Cut.COLUMN, True)


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
        if first >= 0:
            found[first] = Exchange(before=_left(gather, seconds[first], split.tensor, overlapped))
        if last < 0:
            continue
        if backward:
            after = _left(gather + reduce, weights + seconds[last], 0, prices.stack.tp_async)
        else:
            after = _left(reduce, seconds[last], split.tensor, overlapped)
        found[last] = Exchange(found.get(last, Exchange()).before, after)
    return found


def _parts(cuts: Sequence[Role], enter: Cut, leave: Cut) -> list[tuple[int, int]]:
    """(first operator that enters, last one that leaves) of every split part; -1 where a chain begins or ends in it."""
    parts: list[tuple[int, int]] = []
    first, last = -1, -1
    for i, role in enumerate(cuts):
        if role.cut is enter and (first < 0 or last >= 0):
            if max(first, last) >= 0:
                parts.append((first, last))
            first, last = i, -1
        elif role.cut is leave:
            last = i
    return [*parts, (first, last)] if max(first, last) >= 0 else parts


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
