"""Seconds of one operator or collective under a plan: the bridge from a Program's numbers to the kernel formulas."""

from __future__ import annotations

from dataclasses import dataclass

from omnicompile.cost_model.collectives import channel, collective_seconds
from omnicompile.cost_model.hardware import Hardware
from omnicompile.cost_model.kernels import (
    attention_seconds,
    gemm_seconds,
    grouped_gemm_seconds,
    memory_seconds,
    unfused_attention_seconds,
)
from omnicompile.cost_model.step_layout import Group, Split
from omnicompile.cost_model.step_numbers import OpNumbers
from omnicompile.plan import OURS, Stack
from omnicompile.program import OpKind, Phase

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
UNFUSED = "unfused"
QUANTIZE_BYTES = 3
"""Traffic per element that is cast for a GEMM of lower precision: read in 16 bit, written in 8."""

ROWWISE = "_rowwise"
ROWWISE_FRACTION = 0.75
"""Of the rate of a GEMM with one scale per tensor, one with a scale per row; operands are cast once for each of the two
directions that they are multiplied in. Assumed."""


@dataclass(frozen=True)
class Piece:
    """Work of `seconds` on one stream ("compute", "intra", "inter" or "copy").

    launch: not 0 for a collective that the pieces after it do not wait for, but for those that name this number in
    `after`.
    """

    stream: str
    seconds: float
    kind: str
    launch: int = 0
    after: tuple[int, ...] = ()


class Prices:
    """Seconds on one kind of hardware under one software stack; remembers collectives, of which few distinct ones
    occur."""

    def __init__(self, hardware: Hardware, stack: Stack = OURS) -> None:
        named = stack.attention_kernel not in ("", UNFUSED)
        self.hardware = hardware.with_attention_kernel(stack.attention_kernel) if named else hardware
        self.stack = stack
        self._collectives: dict[tuple[str, float, Group, int, int], Piece] = {}
        self._gemms: dict[tuple[float, float, float, float, str], float] = {}

    def collective(
        self, kind: str, nbytes: float, group: Group, copies: int = 0, tensors: int = 1
    ) -> tuple[Piece, ...]:
        """The collective as a piece, or nothing when there is nothing to communicate. `nbytes`: the whole tensor, for
        an all-to-all the local buffer. copies, tensors: see `collective_seconds`."""
        if group.trivial or nbytes <= 0:
            return ()
        key = (kind, nbytes, group, copies, tensors)
        if key not in self._collectives:
            seconds = collective_seconds(kind, nbytes, group.size, group.per_node, self.hardware, copies, tensors)
            self._collectives[key] = Piece(channel(group.size, group.per_node), seconds, kind)
        return (self._collectives[key],)

    def host_copy(self, nbytes: float) -> float:
        """Seconds to move `nbytes` between a GPU and its host memory."""
        link = self.hardware.host_link
        return link.latency_seconds + nbytes / link.bytes_per_second

    def op(
        self,
        numbers: OpNumbers,
        split: Split,
        ep: int,
        inner: bool = False,
        width: float = 0.0,
        layer: bool = True,
    ) -> float:
        """Seconds of one operator on the rank with the largest share of the work.

        inner: it works on what tensor parallelism divides. width: elements per token outside of that. layer: it is part
        of a repeated layer; only those run in the stack's precision of linear layers.
        """
        op = numbers.op
        if op.kind is OpKind.GEMM and op.gemm is not None:
            return self._gemm(gemm_sizes(numbers, split, inner, width), numbers, layer)
        if op.kind is OpKind.ATTENTION and op.attention is not None:
            return self._attention(numbers, split)
        if op.kind is OpKind.GROUPED_GEMM and op.experts is not None:
            return self._experts(numbers, split, ep)
        nbytes = numbers.activation_bytes / split.rows(inner) + numbers.param_bytes / (split.tensor if inner else 1)
        if self.stack.compiled:
            return self.memory(nbytes)
        return max(self.memory(nbytes * self.hardware.eager_traffic), self.hardware.eager_seconds)

    def memory(self, nbytes: float) -> float:
        """Seconds of one kernel that streams `nbytes` through device memory."""
        return memory_seconds(nbytes, self.hardware)

    def _gemm(self, sizes: tuple[float, float, float], numbers: OpNumbers, layer: bool) -> float:
        dtype = (layer and self.stack.gemm_dtype) or numbers.op.dtype
        plain, rate, casts = self._lowered(dtype)
        key = (*sizes, numbers.batch, plain)
        if key not in self._gemms:
            self._gemms[key] = gemm_seconds(*key, self.hardware)
        if dtype == numbers.op.dtype:
            return self._gemms[key]
        return self._gemms[key] / rate + self.memory(casts * _quantized(*sizes, numbers) * QUANTIZE_BYTES)

    def _lowered(self, dtype: str) -> tuple[str, float, int]:
        """The dtype as the hardware file names it, rate relative to its file's, and casts of each operand."""
        plain = dtype.removesuffix(ROWWISE)
        rate, casts = (ROWWISE_FRACTION, 2) if plain != dtype else (1.0, 1)
        return plain, rate * (self.hardware.float8_gain if self.hardware.dtype_key(plain) == "float8" else 1.0), casts

    def _attention(self, numbers: OpNumbers, split: Split) -> float:
        """Heads split: some heads of all rows. Otherwise all heads of the rank's own rows."""
        shape = numbers.op.attention
        assert shape is not None
        rows = float(split.context) if split.heads > 1 else split.tokens
        heads = shape.heads / split.heads / split.tensor
        backward = numbers.op.phase is Phase.BACKWARD
        if self.stack.attention_kernel == UNFUSED:
            return unfused_attention_seconds(
                heads, shape.head_dim, shape.v_head_dim, numbers.pairs / rows, numbers.q_tokens / rows,
                backward, numbers.op.dtype, self.hardware,
            )  # fmt: skip
        return attention_seconds(
            heads,
            max(1.0, shape.kv_heads / split.heads / split.tensor),
            shape.head_dim,
            shape.v_head_dim,
            numbers.pairs / rows,
            numbers.q_tokens / rows,
            numbers.kv_tokens / rows,
            shape.causal,
            backward,
            numbers.op.dtype,
            self.hardware,
        )

    def _experts(self, numbers: OpNumbers, split: Split, ep: int) -> float:
        """Gate, up and down products of a forward; a backward takes as many times that as it has FLOPs."""
        shape, tensor = numbers.op.experts, self.stack.expert_tp
        assert shape is not None
        dtype, rate, casts = self._lowered(self.stack.gemm_dtype or numbers.op.dtype)
        owned = shape.experts / ep
        rows = numbers.tokens / split.rows(False) * shape.top_k * tensor
        inner = shape.intermediate / tensor
        up = grouped_gemm_seconds(rows / owned, 2 * inner, shape.hidden, owned, dtype, self.hardware)
        down = grouped_gemm_seconds(rows / owned, shape.hidden, inner, owned, dtype, self.hardware)
        forward_flops = 6.0 * numbers.tokens * shape.top_k * shape.hidden * shape.intermediate
        products = (up + down) / rate * numbers.flops / forward_flops if forward_flops else 0.0
        if dtype != numbers.op.dtype:
            products += self.memory(casts * rows * (shape.hidden + inner) * QUANTIZE_BYTES)
        return max(
            products, self.memory(numbers.activation_bytes / split.rows(False) + numbers.param_bytes / ep / tensor)
        )


def gemm_sizes(numbers: OpNumbers, split: Split, inner: bool, width: float) -> tuple[float, float, float]:
    """(m, n, k) of one rank: tokens divided, and under tensor parallelism of the other two dimensions the one that is
    not the width of what flows between layers."""
    sizes = {"m": numbers.m, "n": numbers.n, "k": numbers.k}
    along = numbers.op.token_dim
    if along in sizes:
        sizes[along] /= split.tokens
    if split.tensor > 1 and inner:
        free = [name for name in sizes if name != (along or "m")]
        off_stream = [name for name in free if sizes[name] != width] or free[:1]
        sizes[max(off_stream, key=lambda name: sizes[name])] /= split.tensor
    elif split.tensor > 1 and split.tensor_sequence and along in sizes:
        sizes[along] /= split.tensor
    return sizes["m"], sizes["n"], sizes["k"]


def _quantized(m: float, n: float, k: float, numbers: OpNumbers) -> float:
    """Elements cast for one product: a forward casts its input and weight, an input gradient the gradient that comes
    in; both serve the weight gradient too."""
    if numbers.op.token_dim == "k":
        return 0.0
    return m * k + (n * k if numbers.op.phase is Phase.FORWARD else 0.0)
