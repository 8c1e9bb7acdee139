"""The constants of a hardware file from measurements of one machine; no torch.

Groups are fitted one after the other, each on the constants found before: memory, GEMM, grouped GEMM, attention,
collectives. What was not measured is taken from `base`, the file of a known machine, or assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from omnicompile.cost_model.calibration import Errors, Group, Point, errors_by_source
from omnicompile.cost_model.collectives import collective_seconds
from omnicompile.cost_model.hardware import (
    AttentionEfficiency,
    CollectiveEfficiency,
    GemmEfficiency,
    Hardware,
    Link,
)
from omnicompile.cost_model.kernels import attention_seconds, gemm_seconds, grouped_gemm_seconds, memory_seconds
from omnicompile.cost_model.measurements import AttentionTime, CollectiveTime, Measurements

Points = list[Point[Hardware]]
KERNEL = "torch"
SMALLEST_MESSAGE = 16 * 2**10
CPU_TILES = (8, 16, 32, 64)
ASSUMED_NETWORK = Link(50e9, 6e-6)


@dataclass(frozen=True)
class Fit:
    """groups: (name, errors by source) of what was fitted."""

    hardware: Hardware
    groups: tuple[tuple[str, tuple[Errors, ...]], ...]


def fit_hardware(measured: Measurements, base: Hardware | None = None) -> Fit:
    """base: a known machine of this kind, for what was not measured, nominal rates among it."""
    hw = _start(measured, base)
    points = {
        "memory": memory_points(measured),
        "GEMM": gemm_points(measured),
        "grouped GEMM": grouped_points(measured),
    }
    points |= {"attention": attention_points(measured), "collectives": collective_points(measured)}
    hw = _fit_memory(hw, points["memory"])
    hw = _fit_gemm(hw, points["GEMM"], measured.machine.device == "cpu")
    hw = grouped_group(points["grouped GEMM"]).fitted(hw)
    for dtype in dict.fromkeys(row.dtype for row in measured.attention):
        hw = _fit_attention(hw, measured, dtype)
    hw = _fit_collectives(hw, measured, points["collectives"])
    hw = replace(hw, contention_factor=_contention(measured, hw))
    hw = replace(hw, sustained_fraction=_sustained(measured, base))
    burst = replace(hw, sustained_fraction=1.0)  # what was timed were short benchmarks
    groups = tuple((name, tuple(errors_by_source(found, burst))) for name, found in points.items() if found)
    return Fit(hw, groups)


# Before the fit -------------------------------------------------------------------------------------------------------


def _start(measured: Measurements, base: Hardware | None) -> Hardware:
    """The machine with what needs no fit, and neutral efficiencies."""
    machine = measured.machine
    cpu = machine.device == "cpu"
    bandwidth = max((row.nbytes / row.seconds for row in measured.memory), default=0.0)
    bandwidth = bandwidth or (base.memory_bandwidth if base else 1e10)
    peaks = _peaks(measured, base)
    link = _intra_link(measured, base)
    found: dict[str, Any] = {
        "name": machine.name,
        "description": machine.description,
        "aliases": (),
        "memory_bytes": machine.memory_bytes,
        "context_bytes": machine.context_bytes,
        "peak_flops": peaks,
        "memory_fraction": 1.0,
        "sm_count": 1 if cpu else machine.cores,
        "kernel_launch_seconds": measured.launch,
        "kernel_overhead_seconds": measured.launch if cpu else 0.0,
        "sustained_fraction": 1.0,
        "intra_link": link,
        "inter_link": _inter_link(measured, base, link),
        "host_link": _host_link(measured, base, bandwidth),
        "gemm": GemmEfficiency(dict.fromkeys(peaks, 1.0), 1.0, 0.0, 0.0),
    }
    if measured.attention or base is None:
        neutral = AttentionEfficiency({64: 1.0}, {64: 1.0}, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0)
        found["attention"] = {KERNEL: neutral} if base is None else {**base.attention, KERNEL: neutral}
        found["attention_kernel"] = KERNEL
    if base is not None:
        return replace(base, **found)
    return Hardware(
        **found,
        memory_reserve_fraction=0.05,
        memory_bandwidth=bandwidth,
        collective=CollectiveEfficiency(1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0),
        contention_factor=0.0,
    )


def _peaks(measured: Measurements, base: Hardware | None) -> dict[str, float]:
    """FLOP/s by dtype: of a known machine its data sheet's, so that utilization means the same; otherwise the best
    rate that was measured."""
    best: dict[str, float] = {}
    for row in measured.gemms:
        rate = 2.0 * row.m * row.n * row.k * row.batch / row.seconds
        best[row.dtype] = max(best.get(row.dtype, 0.0), rate)
    nominal = dict(base.peak_flops) if base else {}
    return {dtype: nominal.get(dtype, rate) for dtype, rate in (best | nominal).items()} or {"float32": 1e9}


def _bus_rate(row: CollectiveTime) -> float:
    """Bytes a second over a rank's slowest link, as rings move them."""
    share = (row.ranks - 1) / row.ranks * (2.0 if row.kind == "all_reduce" else 1.0)
    return share * row.nbytes / row.seconds


def _intra_link(measured: Measurements, base: Hardware | None) -> Link:
    if base is not None:
        return base.intra_link
    rows = [row for row in measured.collectives if row.ranks <= row.ranks_per_node]
    return Link(max(map(_bus_rate, rows), default=ASSUMED_NETWORK.bytes_per_second), 0.0)


def _inter_link(measured: Measurements, base: Hardware | None, intra: Link) -> Link:
    """Of one rank. Where there is one node only: a known machine's, a CPU's like the link inside, or assumed."""
    if base is not None:
        return base.inter_link
    rows = [row for row in measured.collectives if row.ranks > row.ranks_per_node]
    if rows:
        best = max(_bus_rate(row) / max(1, row.ranks_per_node) for row in rows)
        return Link(best, 0.0)
    return intra if measured.machine.device == "cpu" else ASSUMED_NETWORK


def _host_link(measured: Measurements, base: Hardware | None, bandwidth: float) -> Link:
    """Latency and rate of copies; on a CPU host memory is the memory, read and written."""
    if len(measured.host_copy) >= 2:
        nbytes, seconds = (np.array(column) for column in zip(*measured.host_copy))
        rate = float(max(nbytes / seconds))
        return Link(rate, max(0.0, float(min(seconds - nbytes / rate))))
    return base.host_link if base else Link(bandwidth / 2.0, 0.0)


def _sustained(measured: Measurements, base: Hardware | None) -> float:
    if measured.sustained is not None:
        return measured.sustained
    return base.sustained_fraction if base else 1.0


def _group(
    name: str,
    points: Points,
    apply: Callable[[Hardware, Sequence[float]], Hardware],
    bounds: Sequence[tuple[float, float, float]],
) -> Group[Hardware]:
    """bounds: (start, least, most) of each constant."""
    first, low, high = zip(*bounds)
    return Group(name, points, apply, first, low, high)


# Kernels --------------------------------------------------------------------------------------------------------------


def memory_points(measured: Measurements) -> Points:
    return [
        Point(row.work, row.seconds, lambda hw, row=row: memory_seconds(row.nbytes, hw))  # type: ignore[misc]
        for row in measured.memory
    ]


def _fit_memory(hw: Hardware, points: Points) -> Hardware:
    """The fraction of the bandwidth and, on a machine that queues no kernels, what each kernel takes besides."""
    bounds = [(0.7, 0.01, 1.0)]
    if hw.kernel_overhead_seconds:
        bounds.append((hw.kernel_overhead_seconds, 0.1 * hw.kernel_overhead_seconds, 10.0 * hw.kernel_overhead_seconds))

    def apply(hw: Hardware, x: Sequence[float]) -> Hardware:
        overhead = x[1] if len(x) > 1 else 0.0
        floor = overhead or hw.kernel_launch_seconds
        return replace(hw, memory_fraction=x[0], kernel_overhead_seconds=overhead, kernel_launch_seconds=floor)

    return _group("memory", points, apply, bounds).fitted(hw)


def gemm_points(measured: Measurements) -> Points:
    return [
        Point(row.dtype, row.seconds, lambda hw, r=row: gemm_seconds(r.m, r.n, r.k, r.batch, r.dtype, hw))  # type: ignore[misc]
        for row in measured.gemms
    ]


def _fit_gemm(hw: Hardware, points: Points, cpu: bool) -> Hardware:
    """Fractions of the peaks, of writing and, of a GPU, of small tiles. A CPU packs its operands first, and its tiles
    are of one size: the one that fits best."""
    dtypes = tuple(dict.fromkeys(point.source for point in points))

    def apply(hw: Hardware, x: Sequence[float]) -> Hardware:
        fractions, (store, other) = dict(hw.gemm.max_fraction) | dict(zip(dtypes, x)), x[-2:]
        gemm = replace(hw.gemm, max_fraction=fractions, store_fraction=store)
        changed = replace(gemm, load_fraction=other) if cpu else replace(gemm, small_tile_fraction=other)
        return replace(hw, gemm=changed)

    bounds = [*[(0.8, 0.02, 1.1)] * len(dtypes), (0.5, 0.0, 2.0), (0.5, 0.0, 4.0) if cpu else (0.7, 0.3, 1.0)]
    group = _group("GEMM", points, apply, bounds)
    if not cpu:
        return group.fitted(hw)
    tried = [group.fitted(replace(hw, gemm=replace(hw.gemm, tiles=((side, side),)))) for side in CPU_TILES]
    return min(tried, key=group.loss)


def grouped_points(measured: Measurements) -> Points:
    return [
        Point(
            row.dtype, row.seconds,
            lambda hw, r=row: grouped_gemm_seconds(r.tokens, r.n, r.k, r.experts, r.dtype, hw),  # type: ignore[misc]
        )
        for row in measured.grouped
    ]  # fmt: skip


def grouped_group(points: Points) -> Group[Hardware]:
    def apply(hw: Hardware, x: Sequence[float]) -> Hardware:
        return replace(hw, gemm=replace(hw.gemm, grouped_tokens=x[0]))

    return _group("grouped GEMM", points, apply, [(30.0, 0.0, 2000.0)])


# Attention ------------------------------------------------------------------------------------------------------------


def attention_points(measured: Measurements, dtype: str | None = None) -> Points:
    """Of one dtype, or all."""
    rows = [row for row in measured.attention if dtype in (None, row.dtype)]
    return [Point(f"{r.dtype} {_pass(r)}", r.seconds, lambda hw, r=r: _attention(r, hw)) for r in rows]  # type: ignore[misc]


def _pass(row: AttentionTime) -> str:
    return "backward" if row.backward else "forward"


def _attention(row: AttentionTime, hw: Hardware) -> float:
    tokens = row.segments * row.length
    return attention_seconds(
        row.heads, row.kv_heads, row.head_dim, row.head_dim, float(tokens * row.length), tokens, tokens, row.causal,
        row.backward, row.dtype, hw,
    )  # fmt: skip


def _fit_attention(hw: Hardware, measured: Measurements, dtype: str) -> Hardware:
    """Constants of our programs' attention in one dtype; the first dtype's serve those that are not measured."""
    rows = [row for row in measured.attention if row.dtype == dtype]
    dims = sorted({row.head_dim for row in rows})
    largest = float(max(row.segments * row.length * row.heads * row.head_dim for row in rows))
    cpu = measured.machine.device == "cpu"
    name = KERNEL if dtype == measured.attention[0].dtype else f"{KERNEL}.{dtype}"

    def apply(hw: Hardware, x: Sequence[float]) -> Hardware:
        forward, backward = (dict(zip(dims, x[i * len(dims) :])) for i in (0, 1))
        half, half_back, power, causal, waves = x[-5:]
        constants = AttentionEfficiency(
            forward_fraction=forward,
            backward_fraction=backward,
            forward_length=half,
            backward_length=half_back,
            ramp_power=power,
            causal_length=0.0 if cpu else causal,
            wave_overhead=0.0 if cpu else waves,
            measured_elements=largest,
            causal_block=causal if cpu else 0.0,
        )
        return replace(hw, attention=dict(hw.attention) | {name: constants})

    bounds = [(0.4, 0.005, 1.2)] * (2 * len(dims))
    bounds += [(50.0, 0.0, 2000.0), (50.0, 0.0, 2000.0), (1.2, 0.5, 3.0), (300.0, 0.0, 4000.0), (1.0, 0.0, 5.0)]
    return _group("attention", attention_points(measured, dtype), apply, bounds).fitted(hw)


# Collectives ----------------------------------------------------------------------------------------------------------


def collective_points(measured: Measurements) -> Points:
    """From `SMALLEST_MESSAGE` on: below, all is latency, of which steps have little."""

    def predict(row: CollectiveTime, hw: Hardware) -> float:
        return collective_seconds(row.kind, row.nbytes, row.ranks, row.ranks_per_node, hw, 0, row.tensors)

    return [
        Point(row.kind, row.seconds, lambda hw, row=row: predict(row, hw))  # type: ignore[misc]
        for row in measured.collectives
        if row.nbytes >= SMALLEST_MESSAGE
    ]


def _fit_collectives(hw: Hardware, measured: Measurements, points: Points) -> Hardware:
    """Base seconds, ramp and rates of rings and all-to-alls; reductions relative to gathers. Across nodes besides, if
    there are several."""
    if not points:
        return hw
    several = any(row.ranks > row.ranks_per_node for row in measured.collectives)
    largest = float(max(row.nbytes for row in measured.collectives))

    def apply(hw: Hardware, x: Sequence[float]) -> Hardware:
        base, ramp, power, ring, exchange, scatter, reduce, gathered, scattered, *inter = x
        kinds = {"reduce_scatter": scatter, "all_reduce": reduce}
        tensors = {"all_gather": gathered, "reduce_scatter": scattered}
        found = replace(
            hw.collective, base_seconds=base, ramp_bytes=ramp * largest, ramp_power=power, ring=ring,
            all_to_all_intra=exchange, nvls=0.0, kind_factor=kinds, tensor_seconds=tensors,
            reduce_copies=round(measured.reduce_copies, 2), gather_copies=round(measured.gather_copies, 2),
            inter_ramp_bytes=ramp * largest, inter=ring, all_to_all_inter=exchange,
        )  # fmt: skip
        if inter:
            found = replace(found, inter=inter[0], all_to_all_inter=inter[1], inter_ramp_bytes=inter[2] * largest)
        return replace(hw, collective=found)

    quickest = min(point.seconds for point in points)
    bounds = [(0.5 * quickest, 0.01 * quickest, max(4.0 * quickest, 2e-5)), (0.01, 1e-7, 1.0), (1.0, 0.3, 2.0)]
    bounds += [(0.7, 0.02, 1.0), (0.7, 0.02, 2.0), (1.0, 0.2, 5.0), (1.0, 0.2, 5.0)]
    bounds += [(0.1 * quickest, 0.0, 10.0 * quickest)] * 2
    if several:
        bounds += [(0.8, 0.02, 1.0), (0.7, 0.02, 2.0), (0.05, 1e-7, 2.0)]
    fitted = _group("collectives", points, apply, bounds).fitted(hw)
    if not several and measured.machine.device == "cuda":  # nothing was seen of the network
        seen, known = fitted.collective, hw.collective
        kept = replace(
            seen, inter=known.inter, all_to_all_inter=known.all_to_all_inter, inter_ramp_bytes=known.inter_ramp_bytes
        )
        fitted = replace(fitted, collective=kept)
    return fitted


def _contention(measured: Measurements, hw: Hardware) -> float:
    """By how much of a collective's time compute beside it takes longer, if the collective is the shorter one."""
    rows = [row for row in measured.together if row.collective < row.compute]
    if not rows:
        return hw.contention_factor
    slower = [(row.both - row.compute) / row.collective for row in rows]
    return float(min(2.0, max(0.0, median(slower))))
