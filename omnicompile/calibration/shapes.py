"""Which shapes a calibration times, by device. Data only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from omnicompile.cost_model.measurements import (
    AttentionTime,
    CollectiveTime,
    GemmTime,
    GroupedTime,
    MemoryTime,
)

KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
TENSORS = (1, 10)
"""That one call gathers or reduces: one, and about as many as a layer has parameters."""
KIB, MIB = 2**10, 2**20


@dataclass(frozen=True)
class Shapes:
    """Everything that is timed, with 0 for its seconds. repeats: samples of each; shortest: seconds of a sample at
    least; rotated: bytes over which operands rotate, more than any cache holds. beside: GEMM (m, n, k) and number of
    them, and bytes of an all-gather that runs beside them."""

    gemms: tuple[GemmTime, ...]
    grouped: tuple[GroupedTime, ...]
    attention: tuple[AttentionTime, ...]
    memory: tuple[MemoryTime, ...]
    message_bytes: tuple[int, ...]
    repeats: int
    shortest: float
    rotated: int
    beside: tuple[tuple[tuple[int, int, int], int, int], ...]
    sustained: float


def cpu_shapes(quick: bool) -> Shapes:
    """float32 and bfloat16, at the sizes of models that one core trains."""
    dtypes = ("float32", "bfloat16")
    rows = (64, 512) if quick else (16, 48, 128, 512, 1024)
    widths = ((256, 256), (768, 256)) if quick else ((192, 192), (256, 768), (768, 256), (512, 512), (2048, 384))
    gemms = list(_linear(dtypes, rows, widths))
    if not quick:
        gemms += [GemmTime(d, m, n, k, 8, "nn", 0.0) for d in dtypes for m, n, k in ((64, 64, 32), (256, 32, 256))]
    tokens = (32, 128) if quick else (8, 32, 96, 256)
    lengths = ((1, 128), (1, 512)) if quick else ((8, 32), (4, 64), (4, 128), (1, 256), (1, 512), (1, 1024))
    dims = ((8, 32),) if quick else ((8, 32), (6, 64), (4, 128))
    sizes = (256 * KIB, 4 * MIB) if quick else (16 * KIB, 128 * KIB, 512 * KIB, 2 * MIB, 8 * MIB, 32 * MIB)
    works = ("copy", "add") if quick else ("copy", "add", "silu", "norm", "softmax")
    return Shapes(
        gemms=tuple(gemms),
        grouped=tuple(_grouped(dtypes, tokens, ((384, 192), (192, 192)), 8)),
        attention=tuple(_attention(dtypes, dims, lengths)),
        memory=tuple(MemoryTime(work, size, 0.0) for work, size in product(works, sizes)),
        message_bytes=(64 * KIB, MIB) if quick else (64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 48 * MIB),
        repeats=5 if quick else 15,
        shortest=1e-3 if quick else 2e-3,
        rotated=32 * MIB if quick else 96 * MIB,
        beside=tuple(((512, 512, 512), size // 2, size * MIB) for size in ((4,) if quick else (2, 4, 8))),
        sustained=0.0,
    )


def gpu_shapes(quick: bool, dtypes: tuple[str, ...]) -> Shapes:
    """dtypes: those that the GPU multiplies in; attention runs in 16 bits."""
    rows = (2048, 8192) if quick else (1024, 2048, 4096, 8192, 16384)
    square = ((4096, 4096), (8192, 8192))
    widths = square if quick else (*square, (1024, 4096), (4096, 1024), (12288, 4096), (4096, 12288), (28672, 8192))
    halves = tuple(dtype for dtype in ("bfloat16", "float16") if dtype in dtypes)[:1]
    tokens = (256, 1024) if quick else (64, 256, 1024, 4096)
    lengths = ((8, 2048), (2, 8192)) if quick else ((32, 512), (16, 1024), (8, 2048), (4, 4096), (2, 8192), (1, 16384))
    dims = ((16, 128),) if quick else ((32, 64), (16, 128), (8, 256))
    sizes = (64 * MIB,) if quick else (MIB, 16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB)
    return Shapes(
        gemms=tuple(_linear(dtypes, rows, widths)),
        grouped=tuple(_grouped(halves, tokens, ((2048, 2048), (4096, 2048)), 8)),
        attention=tuple(_attention(halves, dims, lengths)),
        memory=tuple(MemoryTime(work, size, 0.0) for work, size in product(("copy", "add", "norm"), sizes)),
        message_bytes=(4 * MIB, 64 * MIB) if quick else tuple(MIB * 4**i for i in range(6)),
        repeats=3 if quick else 7,
        shortest=2e-3 if quick else 1e-2,
        rotated=256 * MIB,
        beside=(((8192, 8192, 8192), 8, 256 * MIB),),
        sustained=0.0 if quick else 5.0,
    )


def collectives(message_bytes: Iterable[int], groups: Iterable[tuple[int, int]]) -> list[CollectiveTime]:
    """groups: (ranks, of them on a node)."""
    return [
        CollectiveTime(kind, nbytes, ranks, local, tensors, 0.0)
        for ranks, local in groups
        for kind, nbytes in product(KINDS, message_bytes)
        for tensors in (TENSORS if kind in ("all_gather", "reduce_scatter") else (1,))
    ]


def _linear(dtypes: Iterable[str], rows: Iterable[int], widths: Iterable[tuple[int, int]]) -> Iterable[GemmTime]:
    """The three products of a linear layer (n outputs, k inputs): forward, input gradient, weight gradient."""
    for dtype, m, (n, k) in product(dtypes, rows, widths):
        yield GemmTime(dtype, m, n, k, 1, "nt", 0.0)
        if dtype == "float8":  # hardware multiplies in one layout only
            continue
        yield GemmTime(dtype, m, k, n, 1, "nn", 0.0)
        yield GemmTime(dtype, n, k, m, 1, "tn", 0.0)


def _grouped(
    dtypes: Iterable[str], tokens: Iterable[int], widths: Iterable[tuple[int, int]], experts: int
) -> Iterable[GroupedTime]:
    for dtype, rows, (n, k), weight in product(dtypes, tokens, widths, (False, True)):
        yield GroupedTime(dtype, rows, n, k, experts, weight, 0.0)


def _attention(
    dtypes: Iterable[str], dims: Iterable[tuple[int, int]], lengths: Iterable[tuple[int, int]]
) -> Iterable[AttentionTime]:
    """dims: (heads, head dim). Half as many heads of keys as of queries."""
    for dtype, (heads, dim), (segments, length), causal in product(dtypes, dims, lengths, (True, False)):
        for backward in (False, True):
            yield AttentionTime(dtype, heads, heads // 2, dim, segments, length, causal, backward, 0.0)
