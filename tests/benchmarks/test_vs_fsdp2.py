"""The comparison with fully_shard: ratios, the report, and the two sides at a small size."""

from __future__ import annotations

import math
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture()
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("vs_fsdp2")


@pytest.fixture()
def sides(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("fsdp2_contestants")


def seen(seconds: float, peak: int) -> dict[str, Any]:
    steps = [seconds * factor for factor in (1.0, 2.0, 1.5, 1.0, 1.0, 1.0, 4.0)]
    times = {"step": steps, "backward": steps, "cpu": steps}
    return times | {"peak": peak, "held": peak // 2, "first": 1.0, "losses": [2.0, 1.0]}


def test_ratios_are_taken_repeat_by_repeat(bench: ModuleType) -> None:
    noisy = [1.0, 10.0, 3.0, 1.0]
    assert bench.spread([0.5 * x for x in noisy], noisy) == bench.Spread(0.5, 0.5, 0.5)
    assert bench.spread([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5) == bench.Spread(3.0, 2.0, 4.0)
    with pytest.raises(ValueError):
        bench.spread([1.0], [1.0, 2.0])


def test_every_contestant_is_compared_with_every_base(bench: ModuleType) -> None:
    found = {name: seen(1.0 + number, 100) for number, name in enumerate(bench.CONTESTANTS)}
    rows = {(row.base, row.name): row for row in bench.compare("dense", found)}
    assert len(rows) == 6 + 5
    assert rows["fully_shard", "omnicompile step"].step.median == pytest.approx(3.0)
    assert rows["fully_shard compiled", "omnicompile step"].step.median == pytest.approx(1.5)


def test_what_is_measured_by_default(bench: ModuleType) -> None:
    names = bench.chosen(["dense", "moe"], None)
    assert names["dense"] == list(bench.CONTESTANTS) and "omnicompile torch.compile" not in names["moe"]
    assert bench.chosen(["moe"], ["omnicompile step"]) == {"moe": ["fully_shard", "omnicompile step"]}


def test_the_report_names_ratios_and_conditions(bench: ModuleType) -> None:
    measured = {"dense": {"fully_shard": seen(2.0, 200), "omnicompile step": seen(1.0, 150)}}
    text = bench.report(measured, {"machine": "a small one"}, {"dense": {"tokens": 512}})
    assert "| dense | omnicompile step | 0.50 (0.50-0.50) | 0.50 (0.50-0.50) | 0.50 (0.50-0.50) | 0.75 |" in text
    assert "a small one" in text and "fully_shard compiled" not in text


def test_losses_that_differ_are_seen(bench: ModuleType) -> None:
    one, other = seen(1.0, 1), seen(1.0, 1) | {"losses": [2.0, 1.25]}
    assert bench.loss_difference({"a": one, "b": other}) == 0.25
    assert bench.loss_difference({"a": one, "b": one | {"losses": [2.0]}}) == math.inf


def test_losses_in_bfloat16_may_differ_as_those_of_torch_do(bench: ModuleType) -> None:
    one = seen(1.0, 1)
    both = dict(zip(bench.BASES, (one, one | {"losses": [2.0, 1.5]})))
    assert bench.allowed_difference(both, gpu=True) == 1.0 and bench.allowed_difference(both, gpu=False) == 1e-4
    assert bench.allowed_difference({bench.BASES[0]: one}, gpu=True) == 2e-2


def test_the_peak_of_a_step_is_what_it_allocates(sides: ModuleType) -> None:
    def step() -> None:
        a = torch.ones(1000)
        b = a + 1
        del a
        (b * 2).sum().item()

    assert 8000 <= sides.allocated_peak(step) <= 8200


def test_batches_have_equally_many_targets_and_models_are_the_same(sides: ModuleType, bench: ModuleType) -> None:
    assert all(set(sizes) == set(bench.MODELS) for sizes in sides.SIZES.values())
    for kind, size in sides.HOST_SIZES.items():
        batches = [sides.make_batch(kind, size, rank) for rank in (0, 1)]
        assert len({int((batch["labels"][:, 1:] != -100).sum()) for batch in batches}) == 1
        one, other = (sides.build_model(kind, size) for _ in range(2))
        assert torch.equal(
            torch.cat([p.flatten() for p in one.parameters()]), torch.cat([p.flatten() for p in other.parameters()])
        )
        assert math.isfinite(one(**batches[0]).loss.item())
        assert len(list(sides.layers_of(one))) == size.layers * (2 if kind == "vlm" else 1)
