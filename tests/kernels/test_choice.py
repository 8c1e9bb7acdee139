"""Which implementation is taken: asked for, measured, or the first that there is; and what is said of the rest."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from omnicompile.errors import InputError
from omnicompile.kernels import registry
from omnicompile.kernels.choice import KernelChoice, parse_kernels
from omnicompile.kernels.measure import Measurements
from omnicompile.kernels.overview import overview
from omnicompile.kernels.registry import Functions, Kernel, Package, Problem
from omnicompile.kernels.samples import shape_class
from omnicompile.kernels.table import KERNELS, OPERATORS, REGISTRY, VARIANTS, able_kernels, default_kernel, kernels_of

CPU = torch.device("cpu")
SHAPE = (1, 8, 100, 2, 100, 64, 1, 0, 0)
DENSE = Problem("attention", "dense", "cpu", torch.float32, SHAPE, 64)
NORM = Problem("rms_norm", "plain", "cpu", torch.float32, (100, 64))


# Names ---------------------------------------------------------------------------------------------------------------


def test_a_list_is_read() -> None:
    wanted = {"attention": "flash_attn2", "attention.packed": "torch_varlen", "rms_norm": "liger"}
    assert parse_kernels(" attention=flash_attn2, attention.packed = torch_varlen,rms_norm=liger") == wanted
    assert parse_kernels(wanted) == wanted
    assert parse_kernels(None) == parse_kernels("") == {}


@pytest.mark.parametrize(
    "text, message",
    [
        ("atention=flex", "no operator 'atention'; did you mean attention?"),
        ("attention=flash_atn2", "no implementation of attention 'flash_atn2'; did you mean flash_attn2?"),
        ("rms_norm=xyz", "no implementation of rms_norm 'xyz'; there are inductor, liger, reference"),
        ("attention.paked=flex", "no variant of attention 'paked'; did you mean packed?"),
        ("attention", "takes OPERATOR=IMPLEMENTATION"),
        ("attention=flex,attention=reference", "two implementations of attention: flex and reference"),
    ],
)
def test_unknown_names_are_errors_with_a_hint(text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        parse_kernels(text)
    assert message in str(error.value)


def test_what_is_not_available_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"attention=flash_attn2 cannot be used here: it runs on sm80.* this is cpu"):
        KernelChoice.of("attention=flash_attn2", CPU)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match=r"rms_norm=liger cannot be used here: on CPUs .*TRITON_INTERPRET=1"):
        KernelChoice.of({"rms_norm": "liger"}, CPU)


# Availability --------------------------------------------------------------------------------------------------------


def test_every_key_is_one_implementation() -> None:
    assert len(REGISTRY) == sum(len(kernel.places()) for kernel in KERNELS)
    assert set(OPERATORS) == {kernel.operator for kernel in KERNELS}
    assert all(set(kernel.variants) <= set(VARIANTS[kernel.operator]) for kernel in KERNELS)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("hardware", ["cpu", "sm70", "sm80", "sm90", "sm100", "sm120"])
def test_there_is_always_one(operator: str, hardware: str) -> None:
    for variant in VARIANTS[operator]:
        facts = frozenset({"softcap", "sinks", "unequal_heads", "unaligned", "uneven_halves", "layout"})
        problem = Problem(operator, variant, hardware, torch.float64, (), 7, facts)
        assert able_kernels(problem)[-1].name == "reference"


def test_every_module_on_the_cpu_can_be_imported() -> None:
    for kernel in KERNELS:
        if kernel.module and not kernel.missing("cpu"):
            assert isinstance(kernel.functions(), Functions)


def test_packages_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Package("torch", "torch", "2.0").missing() == ""
    assert "torch 2" in Package("torch", "torch", "99.0", "pip install torch").missing()
    assert Package("no_such_module", "no-such", install="pip install no-such").missing() == (
        "no-such is not installed (pip install no-such)"
    )
    assert "is not installed" in Package("no_such_parent.module").missing()
    monkeypatch.setattr(registry, "version_of", lambda name: "2.10.0+cu128")
    assert Package("torch", "x", "2.9").missing() == "" and Package("torch", "x", "2.11").missing() != ""


def test_limits() -> None:
    flash = next(kernel for kernel in KERNELS if kernel.name == "torch_flash")
    half = replace(DENSE, hardware="sm90", dtype=torch.bfloat16)
    assert flash.refuses(half) == ""
    assert "bfloat16, float16, not in float32" in flash.refuses(replace(half, dtype=torch.float32))
    assert "heads of size 512" in flash.refuses(replace(half, head_size=512))
    assert "heads of size 12 are not a multiple of 8" in flash.refuses(replace(half, head_size=12))
    assert "cannot do sinks, softcap" in flash.refuses(replace(half, facts=frozenset({"softcap", "sinks"})))
    flex = next(kernel for kernel in KERNELS if kernel.name == "flex")
    assert flex.refuses(replace(half, head_size=8)) == "heads of size 8 are smaller than 16"
    grouped = kernels_of("grouped_mm")[0]
    aligned = Problem("grouped_mm", "rows", "sm90", torch.bfloat16, (4, 16, 16))
    assert grouped.refuses(aligned) == "" and grouped.refuses(replace(aligned, facts=frozenset({"unaligned"})))


def test_on_cpus_nothing_is_measured_or_replaced() -> None:
    choice = KernelChoice.of(None, CPU)
    assert choice.measurements is None
    assert choice.pick(DENSE).name == "torch_cpu"
    assert choice.pick(replace(DENSE, facts=frozenset({"sinks"}))).name == "reference"
    assert choice.pick(NORM).name == "inductor"
    assert default_kernel(Problem("grouped_mm", "rows", "sm90", torch.bfloat16, (4, 16, 16))).name == "torch"


def test_a_variant_counts_more_than_its_operator() -> None:
    choice = KernelChoice.of("attention=reference,attention.packed=torch_cpu", CPU)
    assert choice.pick(DENSE).name == "reference"
    assert choice.pick(replace(DENSE, variant="packed")).name == "torch_cpu"


def test_one_that_does_not_compute_this_is_refused() -> None:
    choice = KernelChoice.of("attention=torch_cpu", CPU)
    with pytest.raises(InputError, match=r"attention=torch_cpu does not fit model.layers.0: it cannot do softcap"):
        choice.pick(replace(DENSE, facts=frozenset({"softcap"})), "model.layers.0")


# Measurements --------------------------------------------------------------------------------------------------------


def kernel(name: str) -> Kernel:
    return next(k for k in kernels_of("rms_norm") if k.name == name)


def scripted(seconds: dict[str, float], calls: list[str]) -> Callable[[Callable[[], object], torch.device], float]:
    """A timer that gives what it is told, in the order in which it is asked."""
    order = iter(seconds.items())

    def timer(call: Callable[[], object], device: torch.device) -> float:
        name, value = next(order)
        calls.append(name)
        call()
        return value

    return timer


def test_the_fastest_is_taken_and_kept(tmp_path: Path) -> None:
    calls: list[str] = []
    timer = scripted({"inductor": 2.0, "reference": 1.0}, calls)
    found = Measurements(CPU, timer, tmp_path)
    found._seconds = lambda one, run: timer(lambda: None, CPU)  # type: ignore[method-assign]  # without a compiler
    choice = KernelChoice({}, "cpu", found)
    both = [kernel("inductor"), kernel("reference")]
    assert found.fastest(NORM, both).name == "reference"
    assert calls == ["inductor", "reference"]
    again = Measurements(CPU, scripted({}, calls), tmp_path)  # a new process: nothing is measured
    assert again.fastest(replace(NORM, shape=(128, 64)), both).name == "reference"
    assert choice.pick(NORM).name == "inductor"  # alone it need not be measured
    saved = json.loads(again.path.read_text())
    assert saved["device"] == "cpu" and saved["torch"] == version("torch")
    (times,) = saved["seconds"].values()
    assert times == {"inductor": 2.0, "reference": 1.0}


def test_an_implementation_runs_when_it_is_measured(tmp_path: Path) -> None:
    """The reference's forward and backward on the sample, by the given timer."""
    ran: list[float] = []

    def timer(call: Callable[[], object], device: torch.device) -> float:
        outputs = call()
        assert isinstance(outputs, list) and len(outputs) == 3
        ran.append(float(outputs[0].norm()))
        return 1.0

    assert Measurements(CPU, timer, tmp_path).times(NORM, [kernel("reference")]) == {"reference": 1.0}
    assert ran[0] > 0


def test_one_that_fails_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken(call: Callable[[], object], device: torch.device) -> float:
        raise RuntimeError("no kernel image is available\nfor this device")

    found = Measurements(CPU, broken, tmp_path)
    assert found.fastest(DENSE, [k for k in kernels_of("attention") if k.name == "torch_cpu"]).name == "reference"
    assert "attention by torch_cpu does not run here: RuntimeError: no kernel image is available" in caplog.text


def test_other_versions_have_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Measurements(CPU, folder=tmp_path)
    before = found.path
    monkeypatch.setattr("omnicompile.kernels.measure.version_of", lambda name: "99")
    assert found.path != before


def test_a_damaged_file_is_measured_anew(tmp_path: Path) -> None:
    found = Measurements(CPU, lambda call, device: 1.0, tmp_path)
    tmp_path.mkdir(exist_ok=True)
    found.path.write_text("{")
    assert found.times(NORM, [kernel("reference")]) == {"reference": 1.0}


def test_ranks_take_what_one_found() -> None:
    gpu = replace(DENSE, hardware="sm90", dtype=torch.bfloat16)
    asked: list[str] = []

    def agree(find: Callable[[], str]) -> str:
        asked.append("asked")
        return "torch_varlen"

    choice = KernelChoice({}, "sm90", Measurements(CPU), agree)
    assert choice.pick(gpu).name == "torch_varlen" and asked == ["asked"]


def test_shapes_of_about_a_size_are_one_class() -> None:
    assert shape_class(DENSE).shape == (1, 8, 128, 2, 128, 64, 1, 0, 0)
    assert shape_class(replace(NORM, shape=(2**20, 64))).shape == (2**16, 64)


# Overview ------------------------------------------------------------------------------------------------------------


def test_the_overview_names_what_is_picked() -> None:
    lines = {one.operator: one for one in overview(CPU, "rms_norm=reference")}
    assert lines["rms_norm"].picked == "reference" and lines["swiglu"].picked == "inductor"
    assert lines["attention"].available == ("torch_cpu", "reference")
    with pytest.raises(InputError):
        overview(CPU, "rms_norm=lger")
