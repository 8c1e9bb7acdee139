"""What one instance of a segment costs under a block's plan: chains, parameter collectives, copies and memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from omnicompile.cost_model import step_chain, tensor_parallel
from omnicompile.cost_model.step_chain import LOSS_CHUNK_ROWS, Chain
from omnicompile.cost_model.step_layout import Gradient, Group, Groups, Split, local_params, owned_params
from omnicompile.cost_model.step_memory import exchange_buffers, freed, kept, peaks
from omnicompile.cost_model.step_numbers import SegmentNumbers
from omnicompile.cost_model.step_options import StepOptions
from omnicompile.cost_model.step_overlap import overlapped_chain, overlaps
from omnicompile.cost_model.step_price import Piece, Prices
from omnicompile.cost_model.step_rows import joining, with_row_moves
from omnicompile.plan import OURS, BlockPlan, Overlap
from omnicompile.program import OpKind, Recompute, Segment
from omnicompile.sharding import shard_dim

UNFUSED_LOSS_TRAFFIC = 2.5
"""Bytes moved by such a loss relative to one kernel each way: cast, log-softmax, their backwards (30 to 12 a logit)."""


@dataclass(frozen=True)
class UnitWork:
    """What an instance's activations cost: depends on layout, recompute, offload, ep, micro-batch, not on sharding.

    forward / again / backward: strict chains of the forward, of what is recomputed, and of the backward (both empty
    when no backward is needed). host_seconds: one way, for activations kept in host memory.
    Bytes on one GPU: saved from forward to backward on the GPU; host: in host memory instead; recomputed: recreated by
    the recompute; forward_peak: temporaries; backward_peaks / freed: at each of the segment's backward points,
    temporaries and what of the saved or recomputed is not there (any longer, or yet); exchange: all-to-all buffers.
    """

    forward: Chain
    again: Chain
    backward: Chain
    host_seconds: float
    saved: float
    host: float
    recomputed: float
    forward_peak: float
    backward_peaks: tuple[float, ...]
    freed: tuple[float, ...]
    exchange: float


@dataclass(frozen=True)
class UnitWeights:
    """What an instance's parameters cost: depends on sharding, reshard and ep, not on activations.

    gather: all-gathers before use, again before the backward if `regather`. reduce: after the backward of every
    micro-step. once: reductions of the last micro-step of a step alone, beside the backward of other units; refresh:
    gathers of updated parameters, once a step, beside the forward. cast: seconds to bring master shards to compute
    precision before they are gathered, and to put into place what is gathered in other pieces than rows; gradient_cast:
    whole gradients to the precision in which they are reduced.
    Bytes on one GPU: gathered: whole parameters in compute precision (0 where they are resident); staged: besides,
    while they are gathered; gradients: whole ones before reduction, at each of the segment's backward points; reducing:
    the buffer being reduced; owned: gradients that the rank keeps.
    """

    gather: Chain
    regather: bool
    reduce: Chain
    cast: float
    gradient_cast: float
    gathered: float
    gradients: tuple[float, ...]
    reducing: float
    owned: float = 0.0
    once: Chain = ()
    refresh: Chain = ()
    staged: float = 0.0


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

    def chain(indices: list[int], kind: str) -> Chain:
        return _chain(numbers, indices, seconds, split, groups, prices, kind, options.overlap)

    saved, recomputed = kept(numbers, policy, gradient, split, options.stack)
    forward_peak, backward_peaks = peaks(numbers, policy, gradient, split, groups, options)
    host = saved if plan.offload and segment.role not in ("embed", "head") else 0.0
    return UnitWork(
        forward=chain(step_chain.forward_indices(numbers), "compute"),
        again=_again(numbers, policy, split, groups, prices, seconds, options) if gradient.any else (),
        backward=chain(step_chain.backward_indices(numbers, gradient), "compute") if gradient.any else (),
        host_seconds=prices.host_copy(host) if host > 0 else 0.0,
        saved=saved - host,
        host=host,
        recomputed=recomputed,
        forward_peak=forward_peak,
        backward_peaks=backward_peaks,
        freed=freed(numbers, policy, gradient, split, saved + recomputed, options.stack),
        exchange=exchange_buffers(numbers, split, groups),
    )


def _chain(
    numbers: SegmentNumbers,
    indices: list[int],
    seconds: Sequence[float],
    split: Split,
    groups: Groups,
    prices: Prices,
    kind: str,
    overlap: Overlap,
) -> Chain:
    ops, times = step_chain.pick(indices, numbers, seconds)
    times = with_row_moves(ops, times, split, groups, prices, overlap.expert_chunks)
    if overlap.exchanges and overlaps(ops, split, groups):
        chain = overlapped_chain(ops, times, split, groups, prices, kind, overlap)
    elif split.tensor == 1:
        chain = step_chain.op_chain(ops, times, split, groups, prices, kind)
    else:
        roles, width = tensor_parallel.roles(numbers), tensor_parallel.stream_width(numbers)
        chain = step_chain.op_chain(ops, times, split, groups, prices, kind, [roles[i] for i in indices], width)
    return step_chain.launched(chain, ops, prices) if prices.stack.host_bound else chain


def _again(
    numbers: SegmentNumbers,
    policy: Recompute,
    split: Split,
    groups: Groups,
    prices: Prices,
    seconds: tuple[float, ...],
    options: StepOptions,
) -> Chain:
    """What runs again. Attention whose results are kept takes no time, but what goes into it and what comes out of it
    is exchanged again: the backward reads both on the other side of the exchange."""
    stack = options.stack
    again = set(step_chain.recompute_indices(numbers, policy))
    if stack.recompute_whole and policy is Recompute.FULL:
        again = set(step_chain.forward_indices(numbers))
    kept = step_chain.kept_attention(numbers, policy)
    times = [0.0 if i in kept else time for i, time in enumerate(seconds)]
    chain = _chain(numbers, sorted(again | kept.keys()), times, split, groups, prices, "recompute", options.overlap)
    if policy is Recompute.SELECTIVE:  # results of experts are kept as they arrive
        joined = joining(numbers.ops, split, groups, prices, options.overlap.expert_chunks)
        chain = step_chain.merge((*chain, Piece("compute", joined, "recompute"))) if joined else chain
    if stack.recompute_share < 1:
        chain = tuple(replace(p, seconds=p.seconds * stack.recompute_share) for p in chain)
    if not stack.recompute_attention:
        return chain
    forward = [i for i in step_chain.forward_indices(numbers) if i not in again]
    attention = [i for i in forward if numbers.ops[i].op.attention is not None]
    return chain + _chain(numbers, attention, seconds, split, groups, prices, "recompute", Overlap(exchanges=False))


def unit_weights(
    segment: Segment, plan: BlockPlan, gradient: Gradient, groups: Groups, options: StepOptions, prices: Prices
) -> UnitWeights:
    collective = prices.hardware.collective
    gathered = _passing(segment, groups, options.master_bytes, options.param_bytes)
    beside = options.sums_inside and gradient.weight
    gather, reduce = _gather(segment, groups, options, prices), _reductions(segment, gradient, groups, options, prices)
    once = _sums([segment], groups, options, prices, 1) if beside else ()
    refresh = _refreshes([segment], groups, options, prices, 1) if beside else ()
    if keeps_whole(plan, options):
        gather, refresh, reduce, once = (), (*gather, *refresh), (), (*reduce, *once)
    # Other stacks keep a copy of whole parameters in compute precision, and add gradients up where they are reduced.
    casts = not groups.resident or options.stack == OURS
    placed = _placing(segment, groups, options, prices) if options.stack == OURS else 0.0
    reducing = _passing(segment, groups, options.param_bytes, options.reduce_bytes, trained=True)
    return UnitWeights(
        gather=gather,
        regather=plan.reshard and gradient.any,
        reduce=reduce,
        cast=_casts(segment, groups, options.master_bytes, options.param_bytes, True, prices) + placed
        if casts
        else 0.0,
        gradient_cast=_casts(segment, groups, options.param_bytes, options.reduce_bytes, False, prices)
        if casts and gradient.weight
        else 0.0,
        gathered=gathered,
        staged=gathered * collective.gather_copies,
        gradients=_whole_gradients(segment, groups, options.param_bytes if gradient.weight else 0),
        reducing=reducing * max(1.0, collective.reduce_copies) if gradient.weight else 0.0,
        owned=sum(owned_params([segment], groups, 1, trained=True)) * options.reduce_bytes if gradient.weight else 0.0,
        once=once,
        refresh=refresh,
    )


def _whole_gradients(segment: Segment, groups: Groups, nbytes: int) -> tuple[float, ...]:
    """Bytes at each backward point, `nbytes` an element. A head has those of its weight when its logits are gone."""
    dense, expert = local_params(segment, groups, trained=True)
    if segment.logits is not None:
        return ((dense + expert) * nbytes,) * len(segment.backward)
    return tuple((dense * point.dense + expert * point.expert) * nbytes for point in segment.backward)


def _passing(segment: Segment, groups: Groups, before: int, after: int, trained: bool = False) -> float:
    """Bytes of one instance's parameters that a sharded block has for a while: those that are gathered or reduced, and
    a rank's own experts where they are cast from `before` to `after` bytes an element."""
    if groups.resident:
        return 0.0
    dense, expert = local_params(segment, groups, trained)
    return (dense + (0.0 if groups.expert_shard.trivial and before == after else expert)) * after


def keeps_whole(plan: BlockPlan, options: StepOptions) -> bool:
    """Whether sharded parameters are gathered once a step, and their whole gradients summed over its micro-steps."""
    return options.pipelined and not plan.reshard


def segment_policy(segment: Segment, policy: Recompute) -> Recompute:
    """Recompute applies to what repeats; an embedding has nothing to recompute and the head has `LossHead`."""
    return Recompute.NONE if segment.role in ("embed", "head") else policy


def op_seconds(numbers: SegmentNumbers, split: Split, ep: int, chunked: bool, prices: Prices) -> tuple[float, ...]:
    """Seconds of every op of a segment; in a chunked loss head as that many smaller ops, never faster than whole."""
    layer = numbers.segment.role == "layer"
    inner, width = [False] * len(numbers.ops), 0.0
    if split.tensor > 1:
        inner = [role.inner for role in tensor_parallel.roles(numbers)]
        width = tensor_parallel.stream_width(numbers)
    slower = UNFUSED_LOSS_TRAFFIC if numbers.segment.logits is not None and not prices.stack.fused_loss else 1.0
    whole = tuple(
        prices.op(op, split, ep, own, width, layer) * (slower if op.op.kind is OpKind.MEMORY else 1.0)
        for op, own in zip(numbers.ops, inner)
    )
    if not chunked:
        return whole
    chunks = max(1, math.ceil(numbers.logit_rows / split.tokens / LOSS_CHUNK_ROWS))
    smaller = replace(split, tokens=split.tokens * chunks)
    parts = (prices.op(op, smaller, ep, own, width, layer) for op, own in zip(numbers.ops, inner))
    return tuple(max(w, chunks * part) for w, part in zip(whole, parts))


def _gather(segment: Segment, groups: Groups, options: StepOptions, prices: Prices) -> Chain:
    return _whole_params("all_gather", segment, groups, options.param_bytes, prices)


def _reductions(segment: Segment, gradient: Gradient, groups: Groups, options: StepOptions, prices: Prices) -> Chain:
    """Gradient reductions of a micro-step; sums over replicas come after the last one (`replica_sums`)."""
    if not gradient.weight:
        return ()
    return _whole_params("reduce_scatter", segment, groups, options.reduce_bytes, prices, trained=True)


def _whole_params(
    kind: str, segment: Segment, groups: Groups, width: int, prices: Prices, trained: bool = False
) -> Chain:
    """A collective over the parameters of one instance, `width` bytes an element, and one over its experts."""
    dense, expert = local_params(segment, groups, trained)
    params = [param for param in segment.params if param.trained or not trained]
    experts = sum(param.expert for param in params)
    others = len(params) - experts
    return prices.collective(kind, dense * width, groups.shard, tensors=others) + prices.collective(
        kind, expert * width, groups.expert_shard, tensors=experts
    )


def replica_sums(segments: Sequence[Segment], groups: Groups, options: StepOptions, prices: Prices) -> Chain:
    """Gradients of equal shards are summed once the last backward is over, in one buffer for each group of replicas;
    where only the optimizer is sharded, the updated parameters are then gathered."""
    if options.sums_inside:
        return ()
    sums = _sums(segments, groups, options, prices)
    packing = Piece("compute", prices.memory(4 * _summed_bytes(segments, groups, options)), "compute")
    return (*sums, packing, *_refreshes(segments, groups, options, prices)) if sums else ()


def packed_bytes(segments: Sequence[Segment], groups: Groups, options: StepOptions) -> float:
    """Of the buffer in which gradients of equal shards are summed when the last backward is over."""
    outside = options.sums_inside or groups.zero1
    return 0.0 if outside else _summed_bytes(segments, groups, options)


def _summed_bytes(segments: Sequence[Segment], groups: Groups, options: StepOptions) -> float:
    """Of the gradients of a rank that others have too."""
    dense, expert = owned_params(segments, groups, trained=True)
    summed = (0.0 if groups.replica.trivial else dense) + (0.0 if groups.expert_replica.trivial else expert)
    return summed * options.reduce_bytes


def _sums(
    segments: Sequence[Segment], groups: Groups, options: StepOptions, prices: Prices, instances: int | None = None
) -> Chain:
    """Sums over replicas; where the optimizer's state is dealt out among some of them, each of those sums a part."""
    dense, expert = owned_params(segments, groups, instances, trained=True)
    width = options.reduce_bytes
    return _sum(dense * width, groups.replica, groups.states, prices) + _sum(
        expert * width, groups.expert_replica, groups.expert_states, prices
    )


def _sum(nbytes: float, replicas: Group, states: Group, prices: Prices) -> Chain:
    if states.trivial or prices.stack.broadcast_updates:
        return prices.collective("all_reduce", nbytes, replicas)
    scattered = prices.collective("reduce_scatter", nbytes, states)
    beyond = replicas.size // states.size
    across = Group(beyond, max(1, replicas.per_node // states.size))
    return scattered + prices.collective("all_reduce", nbytes / states.size, across)


def _refreshes(
    segments: Sequence[Segment], groups: Groups, options: StepOptions, prices: Prices, instances: int | None = None
) -> Chain:
    if not groups.zero1:
        return ()
    dense, expert = owned_params(segments, groups, instances, trained=True)
    gathers = _refresh(dense * options.param_bytes, groups.states, prices)
    return gathers + _refresh(expert * options.param_bytes, groups.expert_states, prices)


def _refresh(nbytes: float, states: Group, prices: Prices) -> Chain:
    if not prices.stack.broadcast_updates:
        return prices.collective("all_gather", nbytes, states)
    one = prices.collective("broadcast", nbytes / states.size, states)
    return tuple(Piece(piece.stream, piece.seconds * states.size, piece.kind) for piece in one)


def _casts(segment: Segment, groups: Groups, before: int, after: int, shards: bool, prices: Prices) -> float:
    """Seconds to cast each parameter from `before` to `after` bytes an element, its shard or the whole of it."""
    if before == after:
        return 0.0
    seconds = 0.0
    for param in segment.params:
        if not (param.trained or shards):  # what is not trained is brought to compute precision, and has no gradient
            continue
        numel = param.numel / (groups.experts.size * groups.expert_tensor.size if param.expert else groups.tensor.size)
        if shards:
            numel /= (groups.expert_shard if param.expert else groups.shard).size
        seconds += prices.memory(numel * (before + after))
    return seconds


def _placing(segment: Segment, groups: Groups, options: StepOptions, prices: Prices) -> float:
    """Seconds to copy gathered parameters whose pieces do not follow each other in memory. Their gradients are laid out
    for the reduction as they are cast to its precision."""
    if groups.resident:
        return 0.0
    seconds = 0.0
    for param in segment.params:
        owners, shard = (groups.experts.size, groups.expert_shard) if param.expert else (1, groups.shard)
        shape = (param.shape[0] // owners, *param.shape[1:]) if param.shape else ()
        if shard_dim(shape, shard.size):
            seconds += prices.memory(2 * options.param_bytes * param.numel / owners)
    return seconds


def edge_pieces(nbytes: float, groups: Groups, backward: bool, prices: Prices) -> Chain:
    """Encoder output that is spread over SP ranks, brought to the ranks that hold its places in the sequence."""
    return prices.collective("reduce_scatter" if backward else "all_gather", nbytes, groups.sequence)
