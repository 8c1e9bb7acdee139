"""What one instance of a segment costs under a block's plan: chains, parameter collectives, copies and memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from omnicompile.cost_model import step_chain
from omnicompile.cost_model.step_chain import LOSS_CHUNK_ROWS, Chain
from omnicompile.cost_model.step_layout import Gradient, Groups, Split
from omnicompile.cost_model.step_numbers import SegmentNumbers
from omnicompile.cost_model.step_price import Piece, Prices
from omnicompile.plan import BlockPlan, LossHead
from omnicompile.program import OpKind, Recompute, Segment

MASTER_BYTES = 4
"""Of a float32 master weight."""

LOGIT_BYTES = 10
"""Per logit of a chunk in the chunked loss head: bf16 logits and their gradient, float32 probabilities, scratch."""


@dataclass(frozen=True)
class StepOptions:
    """Choices that concern the whole step. Byte sizes of one parameter in compute and of one reduced gradient."""

    micro_batch: int
    loss_head: LossHead
    param_bytes: int = 2
    reduce_bytes: int = 4


@dataclass(frozen=True)
class UnitWork:
    """What an instance's activations cost: depends on layout, recompute, offload, ep, micro-batch, not on sharding.

    forward / again / backward: strict chains of the forward, of what is recomputed, and of the backward (both empty
    when no backward is needed). host_seconds: one way, for activations kept in host memory.
    Bytes on one GPU: saved from forward to backward on the GPU; host: in host memory instead; recomputed: recreated by
    the recompute; forward_peak / backward_peak: temporaries; exchange: all-to-all buffers.
    """

    forward: Chain
    again: Chain
    backward: Chain
    host_seconds: float
    saved: float
    host: float
    recomputed: float
    forward_peak: float
    backward_peak: float
    exchange: float


@dataclass(frozen=True)
class UnitWeights:
    """What an instance's parameters cost: depends on sharding, reshard and ep, not on activations.

    gather: all-gathers before use, again before the backward if `regather`. reduce: after the backward of every
    micro-step. cast: seconds to bring master shards to compute precision before they are gathered; gradient_cast:
    whole gradients to the precision in which they are reduced.
    Bytes on one GPU: gathered: whole parameters in compute precision (0 where they are resident); gradient: whole
    gradients before reduction; reducing: the buffer being reduced.
    """

    gather: Chain
    regather: bool
    reduce: Chain
    cast: float
    gradient_cast: float
    gathered: float
    gradient: float
    reducing: float


@dataclass(frozen=True)
class UnitCost:
    """One instance of a segment under a block's plan; `trains`: it has a backward."""

    name: str
    block: str
    trains: bool
    work: UnitWork
    weights: UnitWeights


def unit_work(
    numbers: SegmentNumbers,
    plan: BlockPlan,
    gradient: Gradient,
    split: Split,
    groups: Groups,
    options: StepOptions,
    prices: Prices,
    seconds: tuple[float, ...],
) -> UnitWork:
    """`seconds`: of each op of the segment in order, the work already split."""
    segment = numbers.segment
    policy = segment_policy(segment, plan.recompute)
    chunked = segment.logits is not None and options.loss_head is LossHead.CHUNKED

    def chain(indices: list[int], kind: str) -> Chain:
        ops, times = step_chain.pick(indices, numbers, seconds)
        return step_chain.op_chain(ops, times, split, groups, prices, kind)

    saved, recomputed = _kept(numbers, policy, gradient, split)
    forward_peak, backward_peak = numbers.forward_peak / split.tokens, numbers.backward_peak / split.tokens
    if chunked and segment.logits is not None:
        rows = min(LOSS_CHUNK_ROWS, numbers.logit_rows / split.tokens)
        forward_peak = backward_peak = rows * segment.logits[1] * LOGIT_BYTES
    elif segment.logits is not None:  # forward and backward of the loss are one kernel: logits and their gradient
        logits = numbers.logit_rows / split.tokens * segment.logits[1] * step_chain.ACTIVATION_BYTES
        # The weight's gradient, which is counted besides, exists only when the logits are gone.
        later = all_params(segment)[0] * options.param_bytes if gradient.weight else 0.0
        forward_peak, backward_peak = 2 * logits, max(2 * logits - later, logits)
    host = saved if plan.offload and segment.role not in ("embed", "head") else 0.0
    return UnitWork(
        forward=chain(step_chain.forward_indices(numbers), "compute"),
        again=_again(numbers, policy, split, groups, prices, seconds) if gradient.any else (),
        backward=chain(step_chain.backward_indices(numbers, gradient), "compute") if gradient.any else (),
        host_seconds=prices.host_copy(host) if host > 0 else 0.0,
        saved=saved - host,
        host=host,
        recomputed=recomputed,
        forward_peak=forward_peak,
        backward_peak=backward_peak,
        exchange=_exchange_buffers(numbers, split, groups),
    )


def _again(
    numbers: SegmentNumbers,
    policy: Recompute,
    split: Split,
    groups: Groups,
    prices: Prices,
    seconds: tuple[float, ...],
) -> Chain:
    """What runs again. Attention whose results are kept takes no time, but what goes into it and what comes out of it
    is exchanged again: the backward reads both on the other side of the exchange."""
    indices = step_chain.recompute_indices(numbers, policy)
    kept = step_chain.kept_attention(numbers, policy)
    ops, times = step_chain.pick(sorted({*indices, *kept}), numbers, seconds)
    times = [0.0 if op.op.name in kept.values() else time for op, time in zip(ops, times)]
    return step_chain.op_chain(ops, times, split, groups, prices, "recompute")


def _kept(numbers: SegmentNumbers, policy: Recompute, gradient: Gradient, split: Split) -> tuple[float, float]:
    """Bytes saved for the backward, and bytes that the recompute recreates."""
    if not gradient.any:
        return 0.0, 0.0
    if numbers.segment.logits is not None:  # of a chunk or of all tokens, gradients are computed with the loss
        return numbers.input_bytes / split.tokens, 0.0
    by_policy = numbers.saved if gradient.weight else numbers.saved_frozen
    saved, everything = by_policy[policy] / split.tokens, by_policy[Recompute.NONE] / split.tokens
    return saved, max(0.0, everything - saved)


def unit_weights(
    segment: Segment, plan: BlockPlan, gradient: Gradient, groups: Groups, options: StepOptions, prices: Prices
) -> UnitWeights:
    dense, expert = all_params(segment)
    local = dense + expert / groups.experts.size
    return UnitWeights(
        gather=_gather(segment, groups, options, prices),
        regather=plan.reshard and gradient.any,
        reduce=_reductions(segment, gradient, groups, options, prices),
        cast=_casts(segment, groups, MASTER_BYTES, options.param_bytes, True, prices),
        gradient_cast=_casts(segment, groups, options.param_bytes, options.reduce_bytes, False, prices)
        if gradient.weight
        else 0.0,
        gathered=0.0 if groups.resident else local * options.param_bytes,
        gradient=local * options.param_bytes if gradient.weight else 0.0,
        reducing=local * options.reduce_bytes if gradient.weight and not groups.resident else 0.0,
    )


def segment_policy(segment: Segment, policy: Recompute) -> Recompute:
    """Recompute applies to what repeats; an embedding has nothing to recompute and the head has `LossHead`."""
    return Recompute.NONE if segment.role in ("embed", "head") else policy


def op_seconds(numbers: SegmentNumbers, split: Split, ep: int, chunked: bool, prices: Prices) -> tuple[float, ...]:
    """Seconds of every op of a segment; in a chunked loss head as that many smaller ops, never faster than whole."""
    whole = tuple(prices.op(op, split, ep) for op in numbers.ops)
    if not chunked:
        return whole
    chunks = max(1, math.ceil(numbers.logit_rows / split.tokens / LOSS_CHUNK_ROWS))
    smaller = Split(split.tokens * chunks, split.heads)
    return tuple(max(w, chunks * prices.op(op, smaller, ep)) for w, op in zip(whole, numbers.ops))


def all_params(segment: Segment) -> tuple[int, int]:
    """(dense, expert) parameters that one instance reads, shared ones included."""
    expert = sum(p.numel for p in segment.params if p.expert)
    return sum(p.numel for p in segment.params) - expert, expert


def _gather(segment: Segment, groups: Groups, options: StepOptions, prices: Prices) -> Chain:
    dense, expert = all_params(segment)
    local_experts = expert / groups.experts.size
    return prices.collective("all_gather", dense * options.param_bytes, groups.shard) + prices.collective(
        "all_gather", local_experts * options.param_bytes, groups.expert_shard
    )


def _reductions(segment: Segment, gradient: Gradient, groups: Groups, options: StepOptions, prices: Prices) -> Chain:
    """Gradient reductions of a micro-step; sums over replicas come after the last one (`replica_sums`)."""
    if not gradient.weight:
        return ()
    dense, expert = all_params(segment)
    dense_bytes, expert_bytes = dense * options.reduce_bytes, expert / groups.experts.size * options.reduce_bytes
    return prices.collective("reduce_scatter", dense_bytes, groups.shard) + prices.collective(
        "reduce_scatter", expert_bytes, groups.expert_shard
    )


def replica_sums(segments: Sequence[Segment], groups: Groups, options: StepOptions, prices: Prices) -> Chain:
    """Gradients of equal shards are summed once the last backward is over, in one buffer for each group of replicas."""
    expert = sum(s.expert_param_count * s.count for s in segments)
    dense = sum(s.param_count * s.count for s in segments) - expert
    dense_bytes = dense * options.reduce_bytes / groups.shard.size
    expert_bytes = expert * options.reduce_bytes / (groups.experts.size * groups.expert_shard.size)
    sums = prices.collective("all_reduce", dense_bytes, groups.replica)
    sums += prices.collective("all_reduce", expert_bytes, groups.expert_replica)
    packed = (dense_bytes if not groups.replica.trivial else 0) + (
        expert_bytes if not groups.expert_replica.trivial else 0
    )
    return (*sums, Piece("compute", prices.memory(4 * packed), "compute")) if sums else ()


def _casts(segment: Segment, groups: Groups, before: int, after: int, shards: bool, prices: Prices) -> float:
    """Seconds to cast each parameter from `before` to `after` bytes an element, its shard or the whole of it."""
    if before == after:
        return 0.0
    seconds = 0.0
    for param in segment.params:
        numel = param.numel / groups.experts.size if param.expert else param.numel
        if shards:
            numel /= (groups.expert_shard if param.expert else groups.shard).size
        seconds += prices.memory(numel * (before + after))
    return seconds


def _exchange_buffers(numbers: SegmentNumbers, split: Split, groups: Groups) -> float:
    """The receive buffer of the largest all-to-all; what is sent is among the saved or recomputed activations."""
    largest = 0.0
    for op in numbers.ops:
        if op.op.attention is not None and split.heads > 1:
            inward, outward = step_chain.attention_exchange_bytes(op, split.heads)
            largest = max(largest, *inward, *outward)
        elif op.op.kind is OpKind.GROUPED_GEMM and op.op.experts is not None and not groups.experts.trivial:
            largest = max(largest, step_chain.expert_exchange_bytes(op, split))
    return largest


def edge_pieces(nbytes: float, groups: Groups, backward: bool, prices: Prices) -> Chain:
    """Encoder output that is spread over SP ranks, brought to the ranks that hold its places in the sequence."""
    return prices.collective("reduce_scatter" if backward else "all_gather", nbytes, groups.sequence)
