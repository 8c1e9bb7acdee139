"""Bytes of activations of one instance of a segment: what is kept for the backward, temporaries, exchange buffers."""

from __future__ import annotations

from omnicompile.cost_model import tensor_parallel
from omnicompile.cost_model.step_chain import LOSS_CHUNK_ROWS, attention_exchange_bytes, expert_exchange_bytes
from omnicompile.cost_model.step_layout import Gradient, Groups, Split, local_params
from omnicompile.cost_model.step_numbers import ACTIVATION_BYTES, SegmentNumbers
from omnicompile.cost_model.step_options import StepOptions
from omnicompile.cost_model.step_price import DTYPE_BYTES, UNFUSED
from omnicompile.plan import OURS, LossHead, Stack
from omnicompile.program import OpKind, Phase, Recompute, Segment

LOGIT_BYTES = 8
"""Per logit of a chunk in the chunked loss head: float32 logits and probabilities. Logits of 16 bits come on top."""

UNFUSED_LOGIT_BYTES = 12
"""Per logit of a head whose loss is not one kernel: 16-bit logits and gradient, and both in float32."""

SCORE_BYTES = 5
"""Kept per score of attention that is not fused: weights before and after dropout in 16 bit, and the mask."""


def peaks(
    numbers: SegmentNumbers,
    policy: Recompute,
    gradient: Gradient,
    split: Split,
    groups: Groups,
    options: StepOptions,
) -> tuple[float, tuple[float, ...]]:
    """Bytes of temporaries in the forward, and at each backward point."""
    segment, held = numbers.segment, _held(numbers, policy, options.stack)
    if segment.logits is None:
        here = split.rows(False)
        return numbers.forward_peak / here, tuple(temporaries / here for temporaries, _ in held)
    forward, backward = _head_peaks(segment, numbers.logit_rows, gradient, split, groups, options)
    return forward, (backward,) * len(held)


def freed(
    numbers: SegmentNumbers, policy: Recompute, gradient: Gradient, split: Split, everything: float, stack: Stack
) -> tuple[float, ...]:
    """Bytes at each backward point of what is not there, of `everything` that was saved or is made again."""
    saved, held = _local_bytes(numbers.saved[Recompute.NONE], numbers, split), _held(numbers, policy, stack)
    if numbers.segment.logits is not None or not gradient.weight or saved <= 0:
        return (0.0,) * len(held)
    # Other software keeps more or less than the traced operators, and is taken to free it at the same pace.
    pace = everything / saved / split.rows(False)
    return tuple(min(freed * pace, everything) for _, freed in held)


def _held(numbers: SegmentNumbers, policy: Recompute, stack: Stack) -> tuple[tuple[float, float], ...]:
    """Temporaries and what is freed at each backward point. Other software runs a layer again before its backward
    begins, and so has everything that it keeps without recompute."""
    return numbers.backward[policy if stack == OURS else Recompute.NONE]


def _head_peaks(
    segment: Segment, logit_rows: float, gradient: Gradient, split: Split, groups: Groups, options: StepOptions
) -> tuple[float, float]:
    assert segment.logits is not None
    rows, vocabulary = logit_rows / split.tokens, segment.logits[1] / split.tensor
    cast = _cast_gradient(segment, groups, options) if gradient.weight else 0.0
    if options.loss_head is LossHead.CHUNKED:
        narrow = options.param_bytes if options.param_bytes < DTYPE_BYTES["float32"] else 0
        chunk = min(LOSS_CHUNK_ROWS, rows) * vocabulary * (LOGIT_BYTES + narrow)
        return chunk, max(chunk, cast)
    if not options.stack.fused_loss:
        return rows * vocabulary * UNFUSED_LOGIT_BYTES, rows * vocabulary * UNFUSED_LOGIT_BYTES
    if options.stack == OURS:  # the gradient is written over the logits (passes/in_place.py)
        logits = rows * vocabulary * max(options.param_bytes, ACTIVATION_BYTES)
        return logits, max(logits, cast)
    # Forward and backward of the loss are one kernel: 16-bit logits and their gradient.
    logits = rows * vocabulary * ACTIVATION_BYTES
    # The weight's gradient, which is counted besides, exists only when the logits are gone.
    later = local_params(segment, groups, trained=True)[0] * options.param_bytes if gradient.weight else 0.0
    return 2 * logits, max(2 * logits - later, logits)


def _cast_gradient(segment: Segment, groups: Groups, options: StepOptions) -> float:
    """Bytes of a head's whole gradient in the dtype that it is reduced in, made when the logits are gone. Its weight is
    there until then, as they are in one stretch of compiled code."""
    if groups.resident or options.reduce_bytes == options.param_bytes:
        return 0.0
    return local_params(segment, groups, trained=True)[0] * options.reduce_bytes


def kept(
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
    twice = _exchanged_results(numbers, split) if gradient.weight else 0.0
    everything += twice
    saved += twice if policy in (Recompute.NONE, Recompute.SELECTIVE) else 0.0
    if stack.fused_kernels:
        width = 1 if stack.gemm_dtype.startswith("float8") else 2
        fused = by_policy[Recompute.SELECTIVE] + _product_inputs(numbers, width)
        everything = min(everything, _local_bytes(fused, numbers, split) + twice)
        saved = everything if policy is Recompute.NONE else min(saved, everything)
    if scores := _score_bytes(numbers, split, stack):
        everything += scores
        if policy in (Recompute.NONE, Recompute.SELECTIVE) and not stack.recompute_attention:
            saved += scores
    if policy is not Recompute.NONE:
        saved = stack.recompute_share * saved + (1 - stack.recompute_share) * everything
    return saved, max(0.0, everything - saved)


def _exchanged_results(numbers: SegmentNumbers, split: Split) -> float:
    """Bytes of what attention gave, on the other side of the exchange of heads for tokens: its own backward reads the
    one, that of the projection after it the other."""
    if split.heads == 1:
        return 0.0
    forward = [op for op in numbers.ops if op.op.attention is not None and op.op.phase is Phase.FORWARD]
    return sum(sum(attention_exchange_bytes(op, split)[1]) for op in forward)


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


def exchange_buffers(numbers: SegmentNumbers, split: Split, groups: Groups) -> float:
    """The receive buffer of the largest all-to-all; what is sent is among the saved or recomputed activations."""
    largest = 0.0
    for op in numbers.ops:
        if op.op.attention is not None and split.heads > 1:
            inward, outward = attention_exchange_bytes(op, split)
            largest = max(largest, *inward, *outward)
        elif op.op.kind is OpKind.GROUPED_GEMM and op.op.experts is not None and not groups.experts.trivial:
            largest = max(largest, expert_exchange_bytes(op, split))
    return largest
