"""Calibration: a fit of times made by the formulas finds the constants again, and files say what was fitted."""

from __future__ import annotations

from dataclasses import fields, replace
from math import exp, sin
from pathlib import Path

import pytest

from omnicompile.cost_model.calibration import Group, Point, errors_of, number_text
from omnicompile.cost_model.calibration_fit import fit_hardware
from omnicompile.cost_model.calibration_notes import comments, head_lines
from omnicompile.cost_model.collectives import KINDS, collective_seconds
from omnicompile.cost_model.hardware import (
    AttentionEfficiency,
    CollectiveEfficiency,
    GemmEfficiency,
    Hardware,
    Link,
    known_hardware,
    load_hardware,
)
from omnicompile.cost_model.hardware_text import hardware_text
from omnicompile.cost_model.kernels import attention_seconds, gemm_seconds, grouped_gemm_seconds, memory_seconds
from omnicompile.cost_model.measurements import (
    AttentionTime,
    CollectiveTime,
    GemmTime,
    GroupedTime,
    Machine,
    Measurements,
    MemoryTime,
    Together,
)
from omnicompile.whole_file import write_whole

MIB = 2**20
CPU = Hardware(
    name="cpu",
    description="a made-up CPU",
    aliases=(),
    memory_bytes=12e9,
    context_bytes=2e8,
    memory_reserve_fraction=0.05,
    peak_flops={"float32": 100e9, "bfloat16": 200e9},
    memory_bandwidth=25e9,
    memory_fraction=0.6,
    sm_count=1,
    kernel_launch_seconds=4e-6,
    sustained_fraction=1.0,
    intra_link=Link(2e9, 0.0),
    inter_link=Link(2e9, 0.0),
    host_link=Link(12.5e9, 0.0),
    gemm=GemmEfficiency({"float32": 0.95, "bfloat16": 0.9}, 1.0, 0.5, 12.0, ((16, 16),), 1.5),
    attention={"torch": AttentionEfficiency({32: 0.4, 64: 0.5}, {32: 0.3, 64: 0.4}, 60.0, 40.0, 1.2, 0, 0, 1e6, 512.0)},
    attention_kernel="torch",
    collective=CollectiveEfficiency(
        0.5, 0.0, 0.5, 0.8, 0.8, 2e-4, 1e4, 1e4, 1.0, {"reduce_scatter": 1.3, "all_reduce": 0.5},
        {"all_gather": 1e-5, "reduce_scatter": 3e-4},
    ),
    contention_factor=0.8,
    kernel_overhead_seconds=4e-6,
)  # fmt: skip


def measured_on(hw: Hardware, noise: float = 0.0) -> Measurements:
    """What a calibration of `hw` would measure, each time off by at most `noise`."""
    count = iter(range(10**6))

    def shaken(seconds: float) -> float:
        return seconds * exp(noise * sin(float(next(count)) * 1.7))

    dtypes = tuple(hw.peak_flops)
    gemms = [
        GemmTime(d, m, n, k, 1, "nt", shaken(gemm_seconds(m, n, k, 1, d, hw)))
        for d in dtypes for m in (24, 64, 256, 1024) for n, k in ((256, 256), (768, 256), (512, 1024), (16, 512))
    ]  # fmt: skip
    grouped = [
        GroupedTime(d, t, 256, 256, 8, False, shaken(grouped_gemm_seconds(t, 256, 256, 8, d, hw)))
        for d in dtypes for t in (16, 64, 256)
    ]  # fmt: skip
    attention = [
        replace(row, seconds=shaken(_attention(row, hw)))
        for dim in (32, 64) for n, s in ((4, 64), (1, 256), (1, 512), (1, 1024), (1, 2048)) for causal in (True, False)
        for back in (False, True) for row in [AttentionTime("float32", 8, 4, dim, n, s, causal, back, 0.0)]
    ]  # fmt: skip
    memory = [MemoryTime("copy", n, shaken(memory_seconds(n, hw))) for n in (2**14, 2**17, 2**20, 2**23, 2**25)]
    collectives = [
        CollectiveTime(kind, n, 2, 2, t, shaken(collective_seconds(kind, n, 2, 2, hw, 0, t)))
        for kind in KINDS[:4] for n in (2**16, 2**18, 2**20, 2**22, 2**24) for t in (1, 10)
        if t == 1 or kind in hw.collective.tensor_seconds
    ]  # fmt: skip
    together = [Together(0.1, 0.02, 0.1 + 0.02 * hw.contention_factor, 0.1 + 0.02 * hw.contention_factor)]
    machine = Machine("cpu", "made up", "a made-up CPU", "cpu", 12e9, 2e8, 1, 2, 2, {"date": "2026-01-01"})
    return Measurements(
        machine=machine,
        launch=hw.kernel_launch_seconds,
        gemms=tuple(gemms),
        grouped=tuple(grouped),
        attention=tuple(attention),
        memory=tuple(memory),
        collectives=tuple(collectives),
        together=tuple(together),
        notes=("a remark",),
    )


def _attention(row: AttentionTime, hw: Hardware) -> float:
    tokens = row.segments * row.length
    return attention_seconds(
        row.heads, row.kv_heads, row.head_dim, row.head_dim, float(tokens * row.length), tokens, tokens, row.causal,
        row.backward, row.dtype, hw,
    )  # fmt: skip


def test_a_fit_finds_the_constants_that_made_the_times() -> None:
    found = fit_hardware(measured_on(CPU)).hardware
    rate = CPU.memory_bandwidth * CPU.memory_fraction
    assert found.memory_bandwidth * found.memory_fraction == pytest.approx(rate, rel=0.01)
    assert found.kernel_overhead_seconds == pytest.approx(CPU.kernel_overhead_seconds, rel=0.05)
    for dtype, fraction in CPU.gemm.max_fraction.items():
        assert found.peak_flops[dtype] * found.gemm.max_fraction[dtype] == pytest.approx(
            CPU.peak_flops[dtype] * fraction, rel=0.01
        )
        assert found.peak_flops[dtype] < CPU.peak_flops[dtype]  # the best that was measured
    assert found.gemm.tiles == CPU.gemm.tiles
    assert found.gemm.load_fraction == pytest.approx(CPU.gemm.load_fraction, rel=0.05)
    assert found.gemm.store_fraction == pytest.approx(CPU.gemm.store_fraction, rel=0.05)
    assert found.gemm.grouped_tokens == pytest.approx(CPU.gemm.grouped_tokens, rel=0.05)
    mine, wanted = found.flash, CPU.flash
    assert mine.causal_block == pytest.approx(wanted.causal_block, rel=0.05)
    for dim in (32, 64):
        for got, true in (
            (mine.forward_fraction, wanted.forward_fraction),
            (mine.backward_fraction, wanted.backward_fraction),
        ):
            assert got[dim] * found.peak_flops["float32"] == pytest.approx(true[dim] * 100e9, rel=0.02)
    assert found.contention_factor == pytest.approx(CPU.contention_factor)
    tensors = found.collective.tensor_seconds
    assert tensors["reduce_scatter"] == pytest.approx(3e-4, rel=0.1)


def test_the_fitted_formulas_give_the_times() -> None:
    fit = fit_hardware(measured_on(CPU, noise=0.05))
    assert {name for name, _ in fit.groups} == {"memory", "GEMM", "grouped GEMM", "attention", "collectives"}
    for name, found in fit.groups:
        for errors in found:
            assert errors.median < 0.06 and errors.p90 < 0.12, (name, errors)


def test_a_known_gpu_keeps_its_data_sheet_and_what_was_not_measured() -> None:
    h100 = load_hardware("h100")
    rows = [GemmTime("bfloat16", 4096, n, 4096, 1, "nt", 1e-3 * n / 4096) for n in (2048, 4096, 8192)]
    machine = Machine("mine", "NVIDIA H100", "1 x H100", "cuda", 85e9, 6e8, 132, 1, 1, {})
    measured = Measurements(machine, 4e-6, tuple(rows), host_copy=((2**20, 4e-5), (2**28, 5e-3)), sustained=0.9)
    found = fit_hardware(measured, h100).hardware
    assert found.peak_flops == h100.peak_flops and found.intra_link == h100.intra_link
    assert found.collective == h100.collective and found.gemm.tiles == h100.gemm.tiles
    assert found.kernel_overhead_seconds == 0.0 and found.sustained_fraction == 0.9
    assert found.host_link.bytes_per_second == pytest.approx(2**28 / 5e-3)
    assert found.attention_kernel in found.attention
    assert gemm_seconds(4096, 4096, 4096, 1, "bfloat16", replace(found, sustained_fraction=1.0)) == pytest.approx(
        1e-3, rel=0.2
    )


def test_a_file_says_where_its_constants_come_from(tmp_path: Path) -> None:
    measured = measured_on(CPU, noise=0.05)
    found = fit_hardware(measured).hardware
    text = hardware_text(found, comments(measured, None), head_lines(measured))
    path = tmp_path / "mine.yaml"
    write_whole(path, text)
    again = load_hardware(str(path))
    assert again.gemm.max_fraction["float32"] == pytest.approx(found.gemm.max_fraction["float32"], rel=1e-3)
    assert "# date: 2026-01-01" in text and "# note: a remark" in text and "(fit) 32 shapes" in text
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", known_hardware())
def test_every_shipped_file_survives_being_written(name: str, tmp_path: Path) -> None:
    hw, path = load_hardware(name), tmp_path / "again.yaml"
    write_whole(path, hardware_text(hw))
    again = load_hardware(str(path))
    for field in fields(Hardware):
        if isinstance(getattr(hw, field.name), float):
            assert getattr(again, field.name) == pytest.approx(getattr(hw, field.name), rel=1e-3)
    assert again.aliases == hw.aliases and set(again.attention) == set(hw.attention)
    assert again.gemm.max_fraction == pytest.approx(hw.gemm.max_fraction, rel=1e-3)


def test_an_old_file_stays_when_a_new_one_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("old")
    with pytest.raises(TypeError):
        write_whole(path, None)  # type: ignore[arg-type]
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_constants_that_only_some_machines_have_change_nothing_by_default() -> None:
    h100 = load_hardware("h100")
    assert h100.kernel_overhead_seconds == h100.gemm.load_fraction == h100.flash.causal_block == 0.0
    assert not h100.collective.kind_factor and not h100.collective.tensor_seconds
    one, many = (collective_seconds("all_gather", 1e8, 8, 8, h100, 0, tensors) for tensors in (1, 12))
    assert one == many


def test_groups_hold_out_sources_and_skip_what_was_not_measured() -> None:
    points = [Point("a", 2.0, lambda x: x), Point("a", 2.0, lambda x: x), Point("b", 4.0, lambda x: 2 * x)]
    group = Group("g", points, lambda _, x: x[0], (1.0,), (0.1,), (10.0,))
    assert group.fitted(1.0) == pytest.approx(2.0, rel=1e-3)
    assert group.held_out(1.0)["b"] == pytest.approx([0.0], abs=1e-3)
    assert group.loss(2.0) == 0.0 < group.loss(3.0)
    assert Group[float]("g", [], lambda _, x: x[0], (1.0,), (0.1,), (10.0,)).fitted(7.0) == 7.0
    assert errors_of("x", [0.0, 0.1, -0.1]).median == pytest.approx(0.105, abs=1e-3)


def test_numbers_are_floats_in_yaml() -> None:
    assert [number_text(x) for x in (0.0, 1.0, 1234.0, 12345.0, 1e-5)] == [
        "0.0",
        "1.0",
        "1.23e+03",
        "1.23e+04",
        "1.00e-05",
    ]
    assert number_text(12345.0, 4) == "1.234e+04" and number_text(1e9, 4) == "1.000e+09"
