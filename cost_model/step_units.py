"""What one instance of a segment costs under a block's plan: chains, parameter collectives, copies and memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from omnicompile.cost_model import step_chain, tensor_parallel
from omnicompile.cost_model.step_chain import LOSS_CHUNK_ROWS, Chain
from omnicompile.cost_model.step_layout import Gradient, Group, Groups, Split
from omnicompile.cost_model.step_numbers import ACTIVATION_BYTES, SegmentNumbers
from omnicompile.cost_model.step_price import DTYPE_BYTES, UNFUSED, Piece, Prices
from omnicompile.plan import OURS, BlockPlan, LossHead, Stack
from omnicompile.program import OpKind, Phase, Recompute, Segment

LOGIT_BYTES = 8
"""Per logit of a chunk in the chunked loss head: float32 logits and probabilities. Logits of 16 bits come on top."""

UNFUSED_LOGIT_BYTES = 12
"""Per logit of a head whose loss is not one kernel: 16-bit logits and gradient, and both in float32."""

UNFUSED_LOSS_TRAFFIC = 2.5
"""Bytes moved by such a loss relative to one kernel each way: cast, log-softmax, their backwards (30 to 12 a logit)."""

SCORE_BYTES = 5
"""Kept per score of attention that is not fused: weights before and after dropout in 16 bit, and the mask."""


@dataclass(frozen=True)
class StepOptions:
    """Choices that concern the whole step. Byte sizes of one parameter in compute and of one reduced gradient.
    pipelined: the model is cut into stages, whose parameters that are not resharded stay whole through the step.
    accumulates: gradients of earlier micro-steps are there from the start (or buffers for them, in other stacks)."""

    micro_batch: int
    loss_head: LossHead
    param_bytes: int = 2
    reduce_bytes: int = 4
    stack: Stack = OURS
    pipelined: bool = False
    accumulates: bool = True

    @property
    def master_bytes(self) -> int:
        """Of a master weight."""
        return DTYPE_BYTES[self.stack.master_dtype]

    @property
    def moment_bytes(self) -> int:
        """Of AdamW's two moments of a weight."""
        return 2 * DTYPE_BYTES[self.stack.moment_dtype]


@dataclass(frozen=True)
class UnitWork:
    """What an instance's activations cost: depends on layout, recompute, offload, ep, micro-batch, not on sharding.

    forward / again / backward: strict chains of the forward, of what is recomputed, and of the backward (both empty
    when no backward is needed). host_seconds: one way, for activations kept in host memory.
    Bytes on one GPU: saved from forward to backward on the GPU; host: in host memory instead; recomputed: recreated by
    the recompute; forward_peak: temporaries; backward_peaks / freed: at each of the segment's backward points,
    temporaries and what is no longer needed of what was saved or recomputed; exchange: all-to-all buffers.
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
    precision before they are gathered; gradient_cast: whole gradients to the precision in which they are reduced.
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
        return _chain(numbers, indices, seconds, split, groups, prices, kind)

    saved, recomputed = _kept(numbers, policy, gradient, split, options.stack)
    forward_peak, backward_peaks = _peaks(numbers, gradient, split, groups, options)
    host = saved if plan.offload and segment.role not in ("embed", "head") else 0.0
    return UnitWork(
        forward=chain(step_chain.forward_indices(numbers), "compute"),
        again=_again(numbers, policy, split, groups, prices, seconds, options.stack) if gradient.any else (),
        backward=chain(step_chain.backward_indices(numbers, gradient), "compute") if gradient.any else (),
        host_seconds=prices.host_copy(host) if host > 0 else 0.0,
        saved=saved - host,
        host=host,
        recomputed=recomputed,
        forward_peak=forward_peak,
        backward_peaks=backward_peaks,
        freed=_freed(numbers, gradient, split, saved + recomputed),
        exchange=_exchange_buffers(numbers, split, groups),
    )


def _chain(
    numbers: SegmentNumbers,
    indices: list[int],
    seconds: Sequence[float],
    split: Split,
    groups: Groups,
    prices: Prices,
    kind: str,
) -> Chain:
    ops, times = step_chain.pick(indices, numbers, seconds)
    if split.tensor == 1:
        chain = step_chain.op_chain(ops, times, split, groups, prices, kind)
    else:
        roles, width = tensor_parallel.roles(numbers), tensor_parallel.stream_width(numbers)
        chain = step_chain.op_chain(ops, times, split, groups, prices, kind, [roles[i] for i in indices], width)
    return step_chain.launched(chain, ops, prices) if prices.stack.host_bound else chain


def _peaks(
    numbers: SegmentNumbers, gradient: Gradient, split: Split, groups: Groups, options: StepOptions
) -> tuple[float, tuple[float, ...]]:
    """Bytes of temporaries in the forward, and at each backward point."""
    segment = numbers.segment
    if segment.logits is None:
        here = split.rows(False)
        return numbers.forward_peak / here, tuple(temporaries / here for temporaries, _ in numbers.backward)
    forward, backward = _head_peaks(segment, numbers.logit_rows, gradient, split, groups, options)
    return forward, (backward,) * len(numbers.backward)


def _freed(numbers: SegmentNumbers, gradient: Gradient, split: Split, everything: float) -> tuple[float, ...]:
    """Bytes at each backward point of what is no longer needed. everything: bytes there at its start."""
    saved = _local_bytes(numbers.saved[Recompute.NONE], numbers, split)
    if numbers.segment.logits is not None or not gradient.weight or saved <= 0:
        return (0.0,) * len(numbers.backward)
    # Other software keeps more or less than the traced operators, and is taken to free it at the same pace.
    pace = everything / saved / split.rows(False)
    return tuple(min(freed * pace, everything) for _, freed in numbers.backward)


def _head_peaks(
    segment: Segment, logit_rows: float, gradient: Gradient, split: Split, groups: Groups, options: StepOptions
) -> tuple[float, float]:
    assert segment.logits is not None
    rows, vocabulary = logit_rows / split.tokens, segment.logits[1] / split.tensor
    if options.loss_head is LossHead.CHUNKED:
        narrow = options.param_bytes if options.param_bytes < DTYPE_BYTES["float32"] else 0
        chunk = min(LOSS_CHUNK_ROWS, rows) * vocabulary * (LOGIT_BYTES + narrow)
        return chunk, chunk
    if not options.stack.fused_loss:
        return rows * vocabulary * UNFUSED_LOGIT_BYTES, rows * vocabulary * UNFUSED_LOGIT_BYTES
    # Forward and backward of the loss are one kernel: 16-bit logits and their gradient. In float32 these are as many
    # bytes as were measured: there Inductor writes the gradient over the logits.
    logits = rows * vocabulary * ACTIVATION_BYTES
    # The weight's gradient, which is counted besides, exists only when the logits are gone.
    later = local_params(segment, groups)[0] * options.param_bytes if gradient.weight else 0.0
    return 2 * logits, max(2 * logits - later, logits)


def _again(
    numbers: SegmentNumbers,
    policy: Recompute,
    split: Split,
    groups: Groups,
    prices: Prices,
    seconds: tuple[float, ...],
    stack: Stack,
) -> Chain:
    """What runs again. Attention whose results are kept takes no time, but what goes into it and what comes out of it
    is exchanged again: the backward reads both on the other side of the exchange."""
    again = set(step_chain.recompute_indices(numbers, policy))
    if stack.recompute_whole and policy is Recompute.FULL:
        again = set(step_chain.forward_indices(numbers))
    kept = step_chain.kept_attention(numbers, policy)
    times = [0.0 if i in kept else time for i, time in enumerate(seconds)]
    chain = _chain(numbers, sorted(again | kept.keys()), times, split, groups, prices, "recompute")
    if stack.recompute_share < 1:
        chain = tuple(Piece(p.stream, p.seconds * stack.recompute_share, p.kind) for p in chain)
    if not stack.recompute_attention:
        return chain
    forward = [i for i in step_chain.forward_indices(numbers) if i not in again]
    attention = [i for i in forward if numbers.ops[i].op.attention is not None]
    return chain + _chain(numbers, attention, seconds, split, groups, prices, "recompute")


def _kept(
    numbers: SegmentNumbers, policy: Recompute, gradient: Gradient, split: Split, stack: Stack
) -> tuple[float, float]:
    """Bytes saved for the backward, and bytes that the recompute recreates."""
    if not gradient.any:
        return 0.0, 0.0
    if numbers.segment.logits is not None:  # of a chunk or of all tokens, gradients are computed with the loss
        return numbers.input_bytes / split.rows(False), 0.0
    by_policy = numbers.saved if gradient.weight else numbers.saved_frozen
    saved = _local_bytes(by_policy[policy], numbers, split)
    everything = _local_bytes(by_policy[Recompute.NONE], numbers, split)
    if stack.fused_kernels:
        width = 1 if stack.gemm_dtype.startswith("float8") else 2
        fused = by_policy[Recompute.SELECTIVE] + _product_inputs(numbers, width)
        everything = min(everything, _local_bytes(fused, numbers, split))
        saved = everything if policy is Recompute.NONE else min(saved, everything)
    if scores := _score_bytes(numbers, split, stack):
        everything += scores
        if policy in (Recompute.NONE, Recompute.SELECTIVE) and not stack.recompute_attention:
            saved += scores
    if policy is not Recompute.NONE:
        saved = stack.recompute_share * saved + (1 - stack.recompute_share) * everything
    return saved, max(0.0, everything - saved)


def _product_inputs(numbers: SegmentNumbers, width: int) -> float:
    """Bytes of the inputs of matrix products that element-wise work makes, `width` an element: one for products that
    read the same, none where attention or the dispatch to experts made them (`selective` keeps those)."""
    total, seen, previous = 0.0, set[float](), None
    roles = tensor_parallel.roles(numbers)
    for op, role in zip(numbers.ops, roles):
        if op.op.phase is not Phase.FORWARD:
            continue
        if op.op.kind is OpKind.GEMM:
            if op.k not in seen and previous is not OpKind.ATTENTION:
                total += op.m * op.k * width
            seen = set() if role.cut is tensor_parallel.Cut.ROW else seen | {op.k}
        elif op.op.experts is not None:
            shape, first = op.op.experts, -1.0 not in seen
            total += 0.0 if first else op.tokens * shape.top_k * shape.intermediate * width
            seen = seen | {-1.0}
        previous = op.op.kind
    return total


def _local_bytes(nbytes: float, numbers: SegmentNumbers, split: Split) -> float:
    """One rank's share of what is kept. Under tensor parallelism without cutting the sequence, the input of each
    split part and of the norm before it stay whole."""
    if split.tensor == 1 or split.tensor_sequence:
        return nbytes / split.rows(False)
    whole = min(nbytes, 2 * max(1, tensor_parallel.sublayers(numbers)) * numbers.input_bytes)
    return (whole + (nbytes - whole) / split.tensor) / split.tokens


def _score_bytes(numbers: SegmentNumbers, split: Split, stack: Stack) -> float:
    """Bytes of scores that attention keeps if it is not fused."""
    if stack.attention_kernel != UNFUSED:
        return 0.0
    ops = [op for op in numbers.ops if op.op.attention is not None and op.op.phase is Phase.FORWARD]
    rows = float(split.context) if split.heads > 1 else split.tokens
    scores = sum(op.pairs * op.op.attention.heads for op in ops if op.op.attention is not None)
    return SCORE_BYTES * scores / rows / split.heads / split.tensor


def unit_weights(
    segment: Segment, plan: BlockPlan, gradient: Gradient, groups: Groups, options: StepOptions, prices: Prices
) -> UnitWeights:
    collective = prices.hardware.collective
    gathered = _passing(segment, groups, options.master_bytes, options.param_bytes)
    beside = options.stack.overlap_gradients and gradient.weight
    gather, reduce = _gather(segment, groups, options, prices), _reductions(segment, gradient, groups, options, prices)
    once = _sums([segment], groups, options, prices, 1) if beside else ()
    refresh = _refreshes([segment], groups, options, prices, 1) if beside else ()
    if keeps_whole(plan, options):
        gather, refresh, reduce, once = (), (*gather, *refresh), (), (*reduce, *once)
    # Other stacks keep a copy of whole parameters in compute precision, and add gradients up where they are reduced.
    casts = not groups.resident or options.stack == OURS
    reducing = _passing(segment, groups, options.param_bytes, options.reduce_bytes)
    return UnitWeights(
        gather=gather,
        regather=plan.reshard and gradient.any,
        reduce=reduce,
        cast=_casts(segment, groups, options.master_bytes, options.param_bytes, True, prices) if casts else 0.0,
        gradient_cast=_casts(segment, groups, options.param_bytes, options.reduce_bytes, False, prices)
        if casts and gradient.weight
        else 0.0,
        gathered=gathered,
        staged=gathered * collective.gather_copies,
        gradients=_whole_gradients(segment, groups, options.param_bytes if gradient.weight else 0),
        reducing=reducing * max(1.0, collective.reduce_copies) if gradient.weight else 0.0,
        owned=sum(owned_params([segment], groups, 1)) * options.reduce_bytes if gradient.weight else 0.0,
        once=once,
        refresh=refresh,
    )


def _whole_gradients(segment: Segment, groups: Groups, nbytes: int) -> tuple[float, ...]:
    """Bytes at each backward point, `nbytes` an element. A head has those of its weight when its logits are gone."""
    dense, expert = local_params(segment, groups)
    if segment.logits is not None:
        return ((dense + expert) * nbytes,) * len(segment.backward)
    return tuple((dense * point.dense + expert * point.expert) * nbytes for point in segment.backward)


def _passing(segment: Segment, groups: Groups, before: int, after: int) -> float:
    """Bytes of one instance's parameters that a sharded block has for a while: those that are gathered or reduced, and
    a rank's own experts where they are cast from `before` to `after` bytes an element."""
    if groups.resident:
        return 0.0
    dense, expert = local_params(segment, groups)
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


def all_params(segment: Segment) -> tuple[int, int]:
    """(dense, expert) parameters that one instance reads, shared ones included."""
    expert = sum(p.numel for p in segment.params if p.expert)
    return sum(p.numel for p in segment.params) - expert, expert


def local_params(segment: Segment, groups: Groups) -> tuple[float, float]:
    """(dense, expert) parameters of one instance, shared ones included, that one rank works with."""
    dense, expert = all_params(segment)
    return dense / groups.tensor.size, expert / groups.experts.size / groups.expert_tensor.size


def _gather(segment: Segment, groups: Groups, options: StepOptions, prices: Prices) -> Chain:
    return _whole_params("all_gather", segment, groups, options.param_bytes, prices)


def _reductions(segment: Segment, gradient: Gradient, groups: Groups, options: StepOptions, prices: Prices) -> Chain:
    """Gradient reductions of a micro-step; sums over replicas come after the last one (`replica_sums`)."""
    if not gradient.weight:
        return ()
    return _whole_params("reduce_scatter", segment, groups, options.reduce_bytes, prices)


def _whole_params(kind: str, segment: Segment, groups: Groups, width: int, prices: Prices) -> Chain:
    """A collective over the parameters of one instance, `width` bytes an element, and one over its experts."""
    dense, expert = local_params(segment, groups)
    experts = sum(param.expert for param in segment.params)
    others = len(segment.params) - experts
    return prices.collective(kind, dense * width, groups.shard, tensors=others) + prices.collective(
        kind, expert * width, groups.expert_shard, tensors=experts
    )


def replica_sums(segments: Sequence[Segment], groups: Groups, options: StepOptions, prices: Prices) -> Chain:
    """Gradients of equal shards are summed once the last backward is over, in one buffer for each group of replicas;
    where only the optimizer is sharded, the updated parameters are then gathered."""
    if options.stack.overlap_gradients:
        return ()
    sums = _sums(segments, groups, options, prices)
    packing = Piece("compute", prices.memory(4 * _summed_bytes(segments, groups, options)), "compute")
    return (*sums, packing, *_refreshes(segments, groups, options, prices)) if sums else ()


def packed_bytes(segments: Sequence[Segment], groups: Groups, options: StepOptions) -> float:
    """Of the buffer in which gradients of equal shards are summed when the last backward is over."""
    outside = options.stack.overlap_gradients or groups.zero1
    return 0.0 if outside else _summed_bytes(segments, groups, options)


def _summed_bytes(segments: Sequence[Segment], groups: Groups, options: StepOptions) -> float:
    """Of the gradients of a rank that others have too."""
    dense, expert = owned_params(segments, groups)
    summed = (0.0 if groups.replica.trivial else dense) + (0.0 if groups.expert_replica.trivial else expert)
    return summed * options.reduce_bytes


def owned_params(segments: Sequence[Segment], groups: Groups, instances: int | None = None) -> tuple[float, float]:
    """(dense, expert) parameters of all instances (or of so many), each counted once, whose shards a rank holds."""
    dense = expert = 0.0
    for segment in segments:
        count = segment.count if instances is None else instances
        expert += segment.expert_param_count * count
        dense += (segment.param_count - segment.expert_param_count) * count
    dense /= groups.tensor.size * groups.shard.size
    return dense, expert / (groups.experts.size * groups.expert_tensor.size * groups.expert_shard.size)


def _sums(
    segments: Sequence[Segment], groups: Groups, options: StepOptions, prices: Prices, instances: int | None = None
) -> Chain:
    """Sums over replicas; where the optimizer's state is dealt out among some of them, each of those sums a part."""
    dense, expert = owned_params(segments, groups, instances)
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
    dense, expert = owned_params(segments, groups, instances)
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
        numel = param.numel / (groups.experts.size * groups.expert_tensor.size if param.expert else groups.tensor.size)
        if shards:
            numel /= (groups.expert_shard if param.expert else groups.shard).size
        seconds += prices.memory(numel * (before + after))
    return seconds


def _exchange_buffers(numbers: SegmentNumbers, split: Split, groups: Groups) -> float:
    """The receive buffer of the largest all-to-all; what is sent is among the saved or recomputed activations."""
    largest = 0.0
    for op in numbers.ops:
        if op.op.attention is not None and split.heads > 1:
            inward, outward = step_chain.attention_exchange_bytes(op, split)
            largest = max(largest, *inward, *outward)
        elif op.op.kind is OpKind.GROUPED_GEMM and op.op.experts is not None and not groups.experts.trivial:
            largest = max(largest, step_chain.expert_exchange_bytes(op, split))
    return largest


def edge_pieces(nbytes: float, groups: Groups, backward: bool, prices: Prices) -> Chain:
    """Encoder output that is spread over SP ranks, brought to the ranks that hold its places in the sequence."""
    return prices.collective("reduce_scatter" if backward else "all_gather", nbytes, groups.sequence)
