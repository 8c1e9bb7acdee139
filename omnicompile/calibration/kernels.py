"""The work that is timed, by shape: GEMMs, and the anchor operators that our programs run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor

from omnicompile.anchors import attention as _attention  # noqa: F401  (these define the operators called below)
from omnicompile.anchors import experts as _experts  # noqa: F401
from omnicompile.calibration.timing import Run
from omnicompile.cost_model.measurements import AttentionTime, GemmTime, GroupedTime, MemoryTime

_oc = torch.ops.omnicompile
MOST_SETS = 64
ROW = 1024
"""Elements of a row that is normalized."""


@dataclass(frozen=True)
class Place:
    """rotated: bytes over which operands rotate, so that they come from memory as those of a step do."""

    device: torch.device
    rotated: int

    def sets(self, make: Callable[[], tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
        """As many sets of operands as rotation takes."""
        first = make()
        nbytes = max(1, sum(t.numel() * t.element_size() for t in first))
        count = min(MOST_SETS, max(1, self.rotated // nbytes))
        return [first, *(tuple(t.clone() for t in first) for _ in range(count - 1))]

    def random(self, *shape: int, dtype: str) -> Tensor:
        kind = getattr(torch, dtype)
        if dtype.startswith("float8"):
            return torch.randn(shape, device=self.device, dtype=torch.bfloat16).to(kind)
        return torch.randn(shape, device=self.device, dtype=kind)


@singledispatch
def work(shape: object, place: Place) -> Run:
    """A function that does once what `shape` describes."""
    raise TypeError(f"no work for {type(shape).__name__}")


@work.register
def _gemm(shape: GemmTime, place: Place) -> Run:
    if shape.dtype == "float8":
        return _scaled(shape, place)
    dtype = "float32" if shape.dtype == "tfloat32" else shape.dtype
    lead = () if shape.batch == 1 else (shape.batch,)
    left = (shape.k, shape.m) if shape.layout[0] == "t" else (shape.m, shape.k)
    right = (shape.n, shape.k) if shape.layout[1] == "t" else (shape.k, shape.n)
    sets = place.sets(lambda: (place.random(*lead, *left, dtype=dtype), place.random(*lead, *right, dtype=dtype)))
    turned = [(a.mT if shape.layout[0] == "t" else a, b.mT if shape.layout[1] == "t" else b) for a, b in sets]
    if shape.dtype != "tfloat32":
        return lambda call: torch.matmul(*turned[call % len(turned)])

    def run(call: int) -> Tensor:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return torch.matmul(*turned[call % len(turned)])
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return run


def _scaled(shape: GemmTime, place: Place) -> Run:
    """float8 operands with a scale each, a bfloat16 result."""
    from torch.nn.functional import ScalingType, scaled_mm

    one = torch.ones((), device=place.device)
    sets = place.sets(
        lambda: (
            place.random(shape.m, shape.k, dtype="float8_e4m3fn"),
            place.random(shape.n, shape.k, dtype="float8_e4m3fn"),
        )
    )

    def run(call: int) -> Tensor:
        a, b = sets[call % len(sets)]
        recipe = ScalingType.TensorWise
        return scaled_mm(a, b.t(), one, recipe, one, recipe, output_dtype=torch.bfloat16)

    return run


@work.register
def _grouped(shape: GroupedTime, place: Place) -> Run:
    rows = shape.tokens * shape.experts
    counts = torch.full((shape.experts,), shape.tokens, device=place.device, dtype=torch.int64)
    other = (rows, shape.n) if shape.weight else (shape.experts, shape.n, shape.k)
    sets = place.sets(lambda: (place.random(rows, shape.k, dtype=shape.dtype), place.random(*other, dtype=shape.dtype)))
    product = _oc.grouped_mm_weight.default if shape.weight else _oc.grouped_mm.default

    def run(call: int) -> Tensor:
        result: Tensor = product(*sets[call % len(sets)], counts, False)
        return result

    return run


@work.register
def _attend(shape: AttentionTime, place: Place) -> Run:
    tokens, length = shape.segments * shape.length, shape.length
    bounds = torch.arange(0, tokens + 1, length, device=place.device, dtype=torch.int32) if shape.segments > 1 else None
    static = (bounds, bounds, None, length, length, shape.causal, shape.head_dim**-0.5, 0, 0.0)

    def heads(number: int) -> Tensor:
        return place.random(1, tokens, number, shape.head_dim, dtype=shape.dtype).transpose(1, 2)

    def make() -> tuple[Tensor, ...]:
        q, k, v = heads(shape.heads), heads(shape.kv_heads), heads(shape.kv_heads)
        return (heads(shape.heads), q, k, v, *_oc.attention.default(q, k, v, *static)) if shape.backward else (q, k, v)

    sets = place.sets(make)
    operator = _oc.attention_backward.default if shape.backward else _oc.attention.default

    def run(call: int) -> object:
        return operator(*sets[call % len(sets)], *static)

    return run


@work.register
def _stream(shape: MemoryTime, place: Place) -> Run:
    """`shape.nbytes` are read and written in all, in float32."""
    tensors = 3 if shape.work == "add" else 2
    rows = max(1, shape.nbytes // (4 * tensors * ROW))
    sets = place.sets(lambda: tuple(place.random(rows, ROW, dtype="float32") for _ in range(tensors - 1)))
    function = _STREAMS[shape.work]
    return lambda call: function(*sets[call % len(sets)])


_STREAMS: dict[str, Callable[..., Tensor]] = {
    "copy": torch.clone,
    "add": torch.add,
    "silu": torch.nn.functional.silu,
    "norm": lambda x: torch.nn.functional.layer_norm(x, (ROW,)),
    "softmax": lambda x: torch.softmax(x, -1),
}


def launch(place: Place) -> Run:
    """A kernel that has nothing to do."""
    one = torch.zeros(1, device=place.device)
    return lambda call: one.add_(1.0)


def host_copy(nbytes: int, place: Place) -> Run:
    """From pinned host memory to the device."""
    source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(nbytes, dtype=torch.uint8, device=place.device)
    return lambda call: target.copy_(source, non_blocking=True)
