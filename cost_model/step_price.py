"""Seconds of one operator or collective under a plan: the bridge from a Program's numbers to the kernel formulas."""

from __future__ import annotations

from dataclasses import dataclass

from omnicompile.cost_model.collectives import channel, collective_seconds
from omnicompile.cost_model.hardware import Hardware
from omnicompile.cost_model.kernels import attention_seconds, gemm_seconds, grouped_gemm_seconds, memory_seconds
from omnicompile.cost_model.step_layout import Group, Split
from omnicompile.cost_model.step_numbers import OpNumbers
from omnicompile.program import OpKind, Phase

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Piece:
    """Work of `seconds` on one stream ("compute", "intra", "inter" or "copy")."""

    stream: str
    seconds: float
    kind: str


class Prices:
    """Seconds on one kind of hardware; remembers collectives, of which few distinct ones occur."""

    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware
        self._collectives: dict[tuple[str, float, Group], Piece] = {}
        self._gemms: dict[tuple[float, float, float, float, str], float] = {}

    def collective(self, kind: str, nbytes: float, group: Group) -> tuple[Piece, ...]:
        """The collective as a piece, or nothing when there is nothing to communicate. `nbytes`: the whole tensor, for
        an all-to-all the local buffer."""
        if group.trivial or nbytes <= 0:
            return ()
        key = (kind, nbytes, group)
        if key not in self._collectives:
            seconds = collective_seconds(kind, nbytes, group.size, group.per_node, self.hardware)
            self._collectives[key] = Piece(channel(group.size, group.per_node), seconds, kind)
        return (self._collectives[key],)

    def host_copy(self, nbytes: float) -> float:
        """Seconds to move `nbytes` between a GPU and its host memory."""
        link = self.hardware.host_link
        return link.latency_seconds + nbytes / link.bytes_per_second

    def op(self, numbers: OpNumbers, split: Split, ep: int) -> float:
        """Seconds of one operator on the rank with the largest share of the work."""
        op = numbers.op
        if op.kind is OpKind.GEMM and op.gemm is not None:
            return self._gemm(numbers, split)
        if op.kind is OpKind.ATTENTION and op.attention is not None:
            return self._attention(numbers, split)
        if op.kind is OpKind.GROUPED_GEMM and op.experts is not None:
            return self._experts(numbers, split, ep)
        return self.memory(numbers.activation_bytes / split.tokens + numbers.param_bytes)

    def memory(self, nbytes: float) -> float:
        """Seconds of one kernel that streams `nbytes` through device memory."""
        return memory_seconds(nbytes, self.hardware)

    def _gemm(self, numbers: OpNumbers, split: Split) -> float:
        op = numbers.op
        m = numbers.m / split.tokens if op.token_dim == "m" else numbers.m
        k = numbers.k / split.tokens if op.token_dim == "k" else numbers.k
        key = (m, numbers.n, k, numbers.batch, op.dtype)
        if key not in self._gemms:
            self._gemms[key] = gemm_seconds(*key, self.hardware)
        return self._gemms[key]

    def _attention(self, numbers: OpNumbers, split: Split) -> float:
        """Heads split: some heads of all rows. Otherwise all heads of the rank's own rows."""
        shape = numbers.op.attention
        assert shape is not None
        rows = 1.0 if split.heads > 1 else split.tokens
        return attention_seconds(
            shape.heads / split.heads,
            max(1.0, shape.kv_heads / split.heads),
            shape.head_dim,
            shape.v_head_dim,
            numbers.pairs / rows,
            numbers.q_tokens / rows,
            numbers.kv_tokens / rows,
            shape.causal,
            numbers.op.phase is Phase.BACKWARD,
            numbers.op.dtype,
            self.hardware,
        )

    def _experts(self, numbers: OpNumbers, split: Split, ep: int) -> float:
        """Gate, up and down products of a forward; a backward takes as many times that as it has FLOPs."""
        shape, dtype = numbers.op.experts, numbers.op.dtype
        assert shape is not None
        owned = shape.experts / ep
        rows = numbers.tokens / split.tokens * shape.top_k
        up = grouped_gemm_seconds(rows / owned, 2 * shape.intermediate, shape.hidden, owned, dtype, self.hardware)
        down = grouped_gemm_seconds(rows / owned, shape.hidden, shape.intermediate, owned, dtype, self.hardware)
        forward_flops = 6.0 * numbers.tokens * shape.top_k * shape.hidden * shape.intermediate
        products = (up + down) * numbers.flops / forward_flops if forward_flops else 0.0
        return max(products, self.memory(numbers.activation_bytes / split.tokens + numbers.param_bytes / ep))
