"""What the benchmark of memory options compares, and how it reports."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from omnicompile.support import not_executable

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20


@pytest.fixture()
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("memory_options")


def test_every_option_changes_a_base_plan_into_one_that_runs(bench: ModuleType) -> None:
    options = bench.options()
    plans = bench.plans([option.name for option in options], "h100")
    assert len({option.name for option in options}) == len(options)
    for option in options:
        (_, base), (_, plan) = plans[f"base {option.model}"], plans[option.name]
        assert plan != base and plan.mesh == base.mesh and not_executable(plan) == ()


def test_an_option_that_saves_less_than_predicted_or_trains_otherwise_fails(bench: ModuleType) -> None:
    def saved(measured: float, loss: float) -> tuple[str, bool]:
        found = {
            "base deep": bench.Peaks(100 * MIB, 100 * MIB, 110 * MIB, [2.0, 1.0]),
            "activation offload": bench.Peaks(50 * MIB, 48 * MIB, 110 * MIB - measured, [2.0, loss]),
        }
        return bench.report(found, ["activation offload"], {"date": "today"})

    text, reached = saved(48 * MIB, 1.0)
    assert reached and "| activation offload | deep | 110.0 | 50.0 | 52.0 | 48.0 | 1.04 | 0 |" in text
    assert not saved(40 * MIB, 1.0)[1]
    assert not saved(48 * MIB, 1.001)[1]
