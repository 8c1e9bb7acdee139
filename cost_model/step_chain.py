"""The chain of work of one segment instance: compute, and the collectives that compute has to wait for.

The pieces of a chain run one after another, but for launches: exchanges that run beside what follows until a piece
waits for them (`step_overlap`). Parameter gathers, gradient reductions and host copies are not part of it; see
`step_units`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from omnicompile.cost_model.step_layout import Gradient, Groups, Split
from omnicompile.cost_model.step_numbers import ACTIVATION_BYTES, OpNumbers, SegmentNumbers
from omnicompile.cost_model.step_price import DTYPE_BYTES, Piece, Prices
from omnicompile.cost_model.tensor_parallel import Exchange, Role, exchanges
from omnicompile.program import OpKind, Phase, Recompute

LOSS_CHUNK_ROWS = 2048
"""Tokens whose logits exist at a time in the chunked loss head."""

Chain = tuple[Piece, ...]


def merge(pieces: Iterable[Piece]) -> Chain:
    """Join neighbours of the same stream and kind; launches, and what waits for them, begin anew."""
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else piece
        joins = (last.stream, last.kind, last.launch) == (piece.stream, piece.kind, 0) and not piece.after
        if merged and joins and not piece.launch:
            merged[-1] = replace(last, seconds=last.seconds + piece.seconds)
        else:
            merged.append(piece)
    return tuple(merged)


def width_of(op: OpNumbers) -> int:
    """Bytes of one element of an operator's result."""
    return DTYPE_BYTES.get(op.op.dtype, ACTIVATION_BYTES)


def attention_exchange_bytes(op: OpNumbers, split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Bytes of one rank's all-to-all buffers around attention under Ulysses: ((query, key, value), (output,)).

    With more ranks than key/value heads, each of those heads is sent to sp / kv_heads ranks.
    """
    shape = op.op.attention
    assert shape is not None
    sp = split.heads
    share = width_of(op) / sp / split.tensor / split.context
    kv_heads = max(shape.kv_heads, sp * split.tensor)
    output = op.q_tokens * shape.heads * shape.v_head_dim * share
    query = op.q_tokens * shape.heads * shape.head_dim * share
    key = op.kv_tokens * kv_heads * shape.head_dim * share
    value = op.kv_tokens * kv_heads * shape.v_head_dim * share
    return (query, key, value), (output,)


def ring_pieces(op: OpNumbers, compute: float, split: Split, groups: Groups, prices: Prices) -> Chain:
    """What of a ring's passing on of keys and values (backward: and of their gradients) is not hidden behind attention.

    Each of `context` steps works on one rank's keys while the next ones arrive, the causal work balanced over ranks.
    """
    shape, ranks = op.op.attention, split.context
    assert shape is not None
    heads = max(1.0, shape.kv_heads / split.tensor)
    nbytes = op.kv_tokens / ranks / split.heads * heads * (shape.head_dim + shape.v_head_dim) * width_of(op)
    passing = prices.collective("send_recv", nbytes * (2 if op.op.phase is Phase.BACKWARD else 1), groups.context)
    left = (ranks - 1) * max(0.0, sum(piece.seconds for piece in passing) - compute / ranks)
    return tuple(Piece(piece.stream, left, piece.kind) for piece in passing if left)


def expert_exchange_bytes(op: OpNumbers, split: Split) -> float:
    """Bytes of one rank's token rows sent to their experts, with balanced routing."""
    shape = op.op.experts
    assert shape is not None
    return op.tokens / split.rows(False) * shape.top_k * shape.hidden * width_of(op)


def expert_positions(ops: Sequence[OpNumbers]) -> list[int]:
    """Of the products of experts."""
    return [i for i, op in enumerate(ops) if op.op.kind is OpKind.GROUPED_GEMM and op.op.experts is not None]


def is_free(op: OpNumbers) -> bool:
    """Whether nothing but a parameter's gradient comes of it."""
    return op.op.phase is Phase.BACKWARD and op.op.feeds == frozenset({"weight"})


def _expert_exchange(op: OpNumbers, split: Split, groups: Groups, prices: Prices) -> Chain:
    assert op.op.experts is not None
    copies = op.op.experts.top_k if prices.stack.dedup_dispatch else 0
    return prices.collective("all_to_all", expert_exchange_bytes(op, split), groups.experts, copies)


def _shared_experts(kind: str, op: OpNumbers, split: Split, groups: Groups, prices: Prices) -> Chain:
    """Ranks that share an expert gather their rows before it and sum its results after it."""
    nbytes = expert_exchange_bytes(op, split) * groups.expert_tensor.size
    return prices.collective(kind, nbytes, groups.expert_tensor)


def launched(chain: Chain, ops: Sequence[OpNumbers], prices: Prices) -> Chain:
    """The chain, its compute stretched to the time that the host takes to launch its operators, if that is longer."""
    compute = sum(piece.seconds for piece in chain if piece.stream == "compute")
    host = len(ops) * prices.hardware.host_seconds
    if not compute or host <= compute:
        return chain
    slower = host / compute
    return tuple(replace(p, seconds=p.seconds * slower) if p.stream == "compute" else p for p in chain)


def op_chain(
    ops: Sequence[OpNumbers],
    seconds: Sequence[float],
    split: Split,
    groups: Groups,
    prices: Prices,
    kind: str,
    cuts: Sequence[Role] = (),
    width: float = 0.0,
) -> Chain:
    """Operators in order, with all-to-alls around attention (heads split) and around the experts (ep > 1), and the
    collectives of tensor and context parallelism. cuts, width: as in `tensor_parallel`."""
    pieces: list[Piece] = []
    around = exchanges(ops, cuts, seconds, split, groups, prices, width) if cuts else {}
    experts = expert_positions(ops)
    for i, op in enumerate(ops):
        compute = Piece("compute", seconds[i], kind)
        beside = around.get(i, Exchange())
        pieces += beside.before
        if op.op.attention is not None and split.heads > 1:
            inward, outward = attention_exchange_bytes(op, split)
            if op.op.phase is Phase.BACKWARD:
                inward, outward = outward, inward
            for nbytes in inward:
                pieces += prices.collective("all_to_all", nbytes, groups.sequence)
            pieces.append(compute)
            pieces += ring_pieces(op, seconds[i], split, groups, prices)
            for nbytes in outward:
                pieces += prices.collective("all_to_all", nbytes, groups.sequence)
            continue
        if experts and i == experts[0]:
            pieces += _expert_exchange(op, split, groups, prices)
            pieces += _shared_experts("all_gather", op, split, groups, prices)
        pieces.append(compute)
        if op.op.attention is not None:
            pieces += ring_pieces(op, seconds[i], split, groups, prices)
        if experts and i == experts[-1]:
            pieces += _shared_experts("reduce_scatter", op, split, groups, prices)
            pieces += _expert_exchange(op, split, groups, prices)
        pieces += beside.after
    return merge(pieces)


def forward_indices(numbers: SegmentNumbers) -> list[int]:
    return [i for i, op in enumerate(numbers.ops) if op.op.phase is Phase.FORWARD]


def backward_indices(numbers: SegmentNumbers, gradient: Gradient) -> list[int]:
    """Backward operators that the wanted gradients need."""
    wanted = {name for name, needed in (("weight", gradient.weight), ("input", gradient.input)) if needed}
    return [
        i
        for i, op in enumerate(numbers.ops)
        if op.op.phase is Phase.BACKWARD and wanted and (not op.op.feeds or op.op.feeds & wanted)
    ]


def recompute_indices(numbers: SegmentNumbers, policy: Recompute) -> list[int]:
    """Forward operators that run again in the backward."""
    names = set(numbers.segment.saved[policy].recompute_ops)
    return [i for i in forward_indices(numbers) if numbers.ops[i].op.name in names]


def kept_attention(numbers: SegmentNumbers, policy: Recompute) -> dict[int, str]:
    """Index -> name of forward attention that does not run again while what it reads does."""
    again = set(numbers.segment.saved[policy].recompute_ops)
    if policy is not Recompute.EXCEPT_ATTENTION or again <= set(
        numbers.segment.saved[Recompute.SELECTIVE].recompute_ops
    ):
        return {}
    return {
        i: numbers.ops[i].op.name
        for i in forward_indices(numbers)
        if numbers.ops[i].op.attention is not None and numbers.ops[i].op.name not in again
    }


def pick(chain_of: list[int], numbers: SegmentNumbers, seconds: Sequence[float]) -> tuple[list[OpNumbers], list[float]]:
    return [numbers.ops[i] for i in chain_of], [seconds[i] for i in chain_of]


def contend(chain: Chain, beside: Chain, factor: float) -> tuple[Chain, int]:
    """The chain slowed by its launches and the collectives `beside` it, and the index of its longest compute piece.

    Prefetches are issued just before that piece: they hide behind it without standing in the way of the chain's own
    collectives. Compute takes 1 + factor times as long for as long as collectives run beside it.
    """
    if not chain:
        return chain, 0
    window = max(range(len(chain)), key=lambda i: chain[i].seconds if chain[i].stream == "compute" else -1.0)
    compute = sum(piece.seconds for piece in chain if piece.stream == "compute")
    widest = chain[window]
    others = sum(piece.seconds for piece in beside) + sum(piece.seconds for piece in chain if piece.launch)
    extra = factor * min(compute, others)
    slowed = replace(widest, seconds=widest.seconds + extra)
    return (*chain[:window], slowed, *chain[window + 1 :]), window
