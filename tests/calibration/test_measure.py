"""Measuring: every kind of shape is run and timed, in one process and in two."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from omnicompile.calibration import measure as measuring
from omnicompile.calibration import processes, shapes
from omnicompile.calibration.collectives import Ranks
from omnicompile.calibration.kernels import Place, work
from omnicompile.calibration.machine import describe, short_name
from omnicompile.calibration.timing import Timer
from omnicompile.cost_model.calibration_fit import fit_hardware
from omnicompile.cost_model.measurements import AttentionTime, GemmTime, GroupedTime, Measurements, MemoryTime
from omnicompile.errors import InputError

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, 1, {})
TINY = replace(
    shapes.cpu_shapes(quick=True),
    gemms=(GemmTime("float32", 8, 16, 24, 1, "nt", 0.0), GemmTime("bfloat16", 8, 16, 24, 2, "tn", 0.0)),
    grouped=(GroupedTime("float32", 4, 8, 8, 2, False, 0.0), GroupedTime("float32", 4, 8, 8, 2, True, 0.0)),
    attention=(
        AttentionTime("float32", 4, 2, 8, 2, 8, True, True, 0.0),
        AttentionTime("float32", 4, 2, 8, 1, 8, False, False, 0.0),
    ),
    memory=tuple(MemoryTime(name, 2**14, 0.0) for name in ("copy", "add", "silu", "norm", "softmax")),
    repeats=2,
    shortest=1e-4,
    rotated=2**14,
)


def test_products_are_those_of_their_layouts() -> None:
    place = Place(CPU, 0)
    for layout in ("nt", "nn", "tn"):
        for batch in (1, 3):
            result = work(GemmTime("float32", 4, 5, 6, batch, layout, 0.0), place)(0)
            assert isinstance(result, torch.Tensor)
            assert tuple(result.shape) == ((4, 5) if batch == 1 else (3, 4, 5))
    with pytest.raises(TypeError, match="no work for str"):
        work("?", place)


def test_operands_rotate_over_the_bytes_asked_for() -> None:
    one = (torch.zeros(256),)
    assert len(Place(CPU, 10 * 1024).sets(lambda: one)) == 10
    assert len(Place(CPU, 0).sets(lambda: one)) == 1


def test_a_timer_takes_as_many_calls_as_a_sample_needs() -> None:
    calls: list[int] = []
    seconds = Timer(CPU, 3, 1e-3, lambda: None).seconds(calls.append)
    assert 0 < seconds < 1e-3 and len(calls) > 100 and calls == sorted(calls)


def test_one_process_measures_everything_but_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "cpu_shapes", lambda quick: TINY)
    said: list[str] = []
    found = measuring.measure(CPU, ALONE, True, "mine", said.append)
    assert found.machine.name == "mine" and found.machine.device == "cpu" and not found.notes
    assert found.points == 2 + 2 + 2 + 5 and not found.collectives
    for group in (found.gemms, found.grouped, found.attention, found.memory):
        assert all(row.seconds > 0 for row in group)
    assert "GEMM bfloat16: 1 shapes" in said
    fitted = fit_hardware(found).hardware
    assert fitted.peak_flops.keys() == {"float32", "bfloat16"} and fitted.sm_count == 1


def test_what_does_not_run_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(shape: object, place: Place) -> object:
        if isinstance(shape, AttentionTime) and shape.causal:
            raise RuntimeError("no such kernel")
        return work(shape, place)

    monkeypatch.setattr(measuring, "cpu_shapes", lambda quick: TINY)
    monkeypatch.setattr(measuring.kernels, "work", refusing)
    found = measuring.measure(CPU, ALONE, True, "", lambda line: None)
    assert len(found.attention) == 1 and found.notes == ("attention: 1 of 2 shapes do not run here",)


def test_the_machine_is_described() -> None:
    machine = describe(CPU, 2, 2, "")
    assert (
        machine.name == "cpu" and machine.memory_bytes > 1e8 and {"date", "packages", "machine"} <= set(machine.facts)
    )
    assert short_name("cuda", "NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_ranks_and_threads_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"--nproc must be 1 to \d+, the cores of this machine, got 100000"):
        processes.number_of_ranks(100_000)
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    with pytest.raises(InputError, match="OMP_NUM_THREADS must be a number, got 'many'"):
        processes.threads()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="torchrun has started the ranks already"):
        processes.calibrate(2, True, "", True)


def test_shapes_of_gpus_and_cpus() -> None:
    dtypes = ("bfloat16", "float16", "tfloat32", "float32", "float8")
    for quick in (True, False):
        gpu, cpu = shapes.gpu_shapes(quick, dtypes), shapes.cpu_shapes(quick)
        assert {row.dtype for row in gpu.gemms} == set(dtypes) and {row.dtype for row in gpu.attention} == {"bfloat16"}
        assert all(row.layout == "nt" for row in gpu.gemms if row.dtype == "float8")
        assert len(gpu.gemms) > len(cpu.memory) > 0
    assert len(shapes.cpu_shapes(True).gemms) < len(shapes.cpu_shapes(False).gemms)
    rows = shapes.collectives((1024, 2048), [(2, 2)])
    assert len(rows) == 2 * (2 + 2 + 1 + 1) and {row.kind for row in rows} == set(shapes.KINDS)


def _together(found: Measurements) -> None:
    assert {row.kind for row in found.collectives} == set(shapes.KINDS) and found.together
    assert all(row.seconds > 0 for row in found.collectives)


@pytest.mark.slow
def test_two_gloo_processes(tmp_path: Path) -> None:
    found = processes.calibrate(2, True, "", True)
    assert found is not None and found.machine.ranks == 2
    _together(found)


@pytest.mark.gpu
def test_a_gpu() -> None:
    found = processes.calibrate(1, True, "", True)
    assert found is not None and found.machine.device == "cuda" and found.machine.cores > 1
    assert {row.dtype for row in found.gemms} >= {"float16", "float32"} and found.attention and found.host_copy
    fitted = fit_hardware(found)
    assert all(errors.median < 0.5 for _, group in fitted.groups for errors in group)


@pytest.mark.gpu
def test_several_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    found = processes.calibrate(None, True, "", True)
    assert found is not None
    _together(found)
