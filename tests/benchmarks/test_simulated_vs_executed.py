"""The comparison of predictions with executed plans: rows, ranking, the report, and that every plan can be priced."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from omnicompile.plan import Plan

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture()
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("simulated_vs_executed")


@pytest.fixture()
def plans(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("executed_plans")


def seen(seconds: float, peak: int = 100) -> dict[str, Any]:
    steps = [seconds * factor for factor in (0.9, 1.0, 1.1, 1.0, 1.0, 3.0, 1.0)]
    peaks = {"peak": peak, "peaks": [peak, peak], "held": peak // 2}
    return {"step": steps, "cpu": steps, **peaks, "compute": {"gemm": 0.3}, "losses": [1.0]}


def row(bench: ModuleType, name: str, measured: float, predicted: float, family: str = "a", tokens: int = 1000) -> Any:
    return bench.make_row(name, family, tokens, seen(measured), predicted, 104.0)


def test_a_row_is_a_median_beside_a_prediction(bench: ModuleType) -> None:
    found = row(bench, "x", 2.0, 2.4)
    assert (found.measured, found.low, found.high) == (2.0, 2.0, pytest.approx(2.1))
    assert found.time_error == pytest.approx(0.2) and found.memory_error == pytest.approx(0.04)


def test_plans_of_one_model_are_ranked_by_tokens(bench: ModuleType) -> None:
    rows = [row(bench, "slow", 2.0, 2.1), row(bench, "fast", 1.0, 1.2), row(bench, "other", 9.0, 0.1, "b")]
    assert bench.ordered_pairs(rows) == (1, 1)
    assert bench.ordered_pairs([*rows, row(bench, "wrong", 1.5, 9.0)]) == (2, 3)
    assert bench.ordered_pairs([row(bench, "a", 1.0, 1.0), row(bench, "b", 1.01, 0.9)]) == (0, 0)  # too near
    half = row(bench, "half the tokens", 1.1, 1.1, tokens=500)
    assert bench.ordered_pairs([rows[0], half]) == (1, 1)


def test_the_report_says_what_is_reached(bench: ModuleType) -> None:
    rows = [row(bench, "near", 1.0, 1.1), row(bench, "far", 1.0, 1.3)]
    details = {"near": {"predicted": {"gemm": 0.25}, "measured": {"gemm": 0.3}}}
    fit = [{"group": "GEMM", "source": "float32", "points": 7, "median": 0.03, "p90": 0.1, "bias": -0.01}]
    text = bench.report(rows, {"machine": "a small one"}, details, fit)
    assert "| near | 1000.0 (1000.0-1050.0) | 1100.0 | +10.0% | 1000.0 |" in text
    assert "- 1 of 2 predicted within 20% of the measured step time" in text
    assert "- 2 of 2 predicted within 5% of the measured peak memory" in text
    assert "| near | 250.0 | 300.0 | 0.0 | 0.0 | 0.0 | 0.0 |" in text
    assert "| GEMM | float32 | 7 | 3.0% | 10.0% | -1.0% |" in text and "- machine: a small one" in text


def test_there_are_enough_plans_and_their_batches_fit_their_workloads(plans: ModuleType) -> None:
    cpu, gpu = plans.cases(False), plans.cases(True)
    assert len(cpu) >= 5 and len(gpu) >= 6 and all(case.mesh.world == 2 for case in cpu.values())
    assert all(case.mesh.world == 1 for case in gpu.values())
    for case in cpu.values():
        plan, batch = case.plan("h100", "float32"), case.batch(0)
        assert isinstance(plan, Plan) and plan.mesh.world == plan.cluster.gpus and plan.accumulation == 1
        assert tuple(batch["input_ids"].shape) == (case.rows, case.size.tokens)
        assert case.tokens == plan.global_batch * plan.workload.seq_len
        if case.kind == "vlm":
            patches = plan.workload.image_size[0] * plan.workload.image_size[1] // 64
            assert batch["pixel_values"].shape[0] == 2 * patches
        same = torch.equal(batch["input_ids"], case.batch(1)["input_ids"])
        assert same == (case.mesh.sp == 2)


def test_a_plan_is_predicted_in_its_own_dtype(plans: ModuleType) -> None:
    case = plans.Case("tiny", "t", "dense", plans.Size(64, 1, 64, 128, head=16), plans.Mesh(dp_shard=2))
    found = plans.Predictor("h100", "float32")(case)
    assert found.step > 0 and found.compute["gemm"] > 0 and found.compute["attention"] > 0
    parameters = sum(p.numel() for p in plans.build_model("dense", case.size).parameters())
    assert found.memory["parameters"] == pytest.approx(2 * parameters)  # half of them in float32
    assert found.peak == pytest.approx(sum(v for k, v in found.memory.items() if k not in plans.OVERHEAD))


def test_operators_within_operators_count_once(plans: ModuleType) -> None:
    outer = SimpleNamespace(name="omnicompile::grouped_mm", cpu_parent=None)
    inner = SimpleNamespace(name="aten::matmul", cpu_parent=outer)
    assert plans._within(inner) and not plans._within(SimpleNamespace(name="aten::matmul", cpu_parent=None))
    assert not plans._within(None)


@pytest.mark.gpu
def test_a_plan_runs_on_a_gpu(bench: ModuleType, tmp_path: Path) -> None:
    found = bench.run(["dense"], 1, 7, "inductor", str(tmp_path))
    assert len(found["dense"]["step"]) == 7 and found["dense"]["peak"] > found["dense"]["held"] > 0
