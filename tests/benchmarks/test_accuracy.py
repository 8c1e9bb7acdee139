"""The accuracy report: its statistics on made-up outcomes, and the command on a small file."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from omnicompile.plan import Prediction

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
RUNS = BENCHMARKS / "data" / "runs.csv"
TINY = "layers=2,hidden=256,heads=4,kv_heads=4,ffn=1024(non-gated GELU),vocab=512,learned-pos,tied-emb"


@pytest.fixture()
def statistics(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("published_statistics")


@pytest.fixture()
def spec(statistics: ModuleType) -> Any:
    rows = import_module("published_rows").read_rows(RUNS)
    return import_module("published_specs").spec_of(next(row for row in rows if row.id == "MPT-115"))


def outcome(spec: Any, name: str, measured: float, predicted: float, **changes: Any) -> Any:
    """An outcome of a run like `spec`; memory: (measured, predicted) bytes; layout: keys added."""
    memory, layout = changes.pop("memory", (None, 0.0)), changes.pop("layout", {})
    kinds = {"parameters": memory[1], "context": 8.0, "allocator slack": 4.0}
    prediction = Prediction(predicted, 0.0, 0.0, 0.0, kinds, 1e12, {"compute": predicted})
    own = replace(spec, id=name, suite=name.partition("-")[0], seconds=measured, memory=memory[0], **changes)
    found: Any = import_module("published_runs").Outcome(own, {**spec.layout.layout, **layout}, prediction)
    return found


def test_errors_of_ratios(statistics: ModuleType) -> None:
    found = statistics.errors([0.9, 1.0, 1.1, 1.2, 0.5])
    assert (found.rows, found.median, found.bias) == (5, pytest.approx(0.1), pytest.approx(0.0))
    assert found.p90 == pytest.approx(0.2 + 0.6 * (0.5 - 0.2))  # position 3.6 of 0, 0.1, 0.1, 0.2, 0.5


def test_the_factor_makes_the_median_one(statistics: ModuleType) -> None:
    ratios = [0.5, 0.8, 4.0]
    assert statistics.factor(ratios) == pytest.approx(1 / 0.8)


def test_a_factor_of_the_other_rows_has_not_seen_the_row(statistics: ModuleType) -> None:
    found = statistics.corrected_by_others([1.0, 2.0])
    assert (found.rows, found.median, found.p90) == (2, pytest.approx(0.75), pytest.approx(0.95))  # 0.5 and 2.0
    assert statistics.corrected_by_others([1.0]) is None


def test_the_headline_is_a_median_over_publishers_of_rows_that_count(statistics: ModuleType, spec: Any) -> None:
    outcomes = [
        *(outcome(spec, f"ONE-{i}", 1.0, 1.1) for i in range(9)),
        outcome(spec, "TWO-1", 1.0, 1.3),
        outcome(spec, "THREE-1", 1.0, 0.5),
        outcome(spec, "THREE-2", 1.0, 2.0),
        outcome(spec, "FOUR-1", 1.0, 9.0, gpu_text="B200-SXM"),
        outcome(spec, "FIVE-1", 1.0, 9.0, weak="routing"),
    ]
    ways = (statistics.plain, statistics.corrected)
    plain, corrected = (statistics.headline(outcomes, way) for way in ways)
    assert (plain.rows, plain.median) == (12, pytest.approx(0.3))
    assert corrected.median == pytest.approx(0.0)
    assert [o.spec.id for o in statistics.timed(outcomes, weak=True)] == ["FIVE-1"]


def test_groups_by_parallelism(statistics: ModuleType, spec: Any) -> None:
    def kinds(**layout: str) -> list[str]:
        found: list[str] = statistics.parallelism(outcome(spec, "A-1", 1.0, 1.0, layout=layout))
        return found

    assert kinds() == ["fsdp alone"]
    assert kinds(sharding="zero1") == ["data parallel alone"]
    assert kinds(tp="2", pp="4", sp="8") == ["tp", "pp", "cp or sp"]
    assert kinds(cp="2", ep="8", tp="1") == ["cp or sp", "ep"]


def test_a_sweep_is_a_hit_if_the_predicted_best_is_nearly_the_measured_best(statistics: ModuleType, spec: Any) -> None:
    def sweep(second: float) -> Any:
        times = [(1.0, 1.2), (second, 1.1), (1.5, 1.3), (2.0, 2.0)]
        runs = [outcome(spec, f"A-{i}", m, p, layout={"tp": str(i + 1)}) for i, (m, p) in enumerate(times)]
        (found,) = statistics.sweeps(runs)
        return found

    near, far = sweep(1.02), sweep(1.1)
    assert (near.predicted_best, near.measured_best, near.layouts) == ("A-1", "A-0", 4)
    assert (near.hit, far.hit) == (True, False)
    assert far.regret == pytest.approx(0.1)
    same = [outcome(spec, f"A-{i}", 1.0, 1.0, layout={"tp": str(i % 3 + 1)}) for i in range(6)]
    assert statistics.sweeps(same) == []


def test_memory_is_compared_with_the_kind_that_was_measured(spec: Any) -> None:
    found = {
        kind: outcome(spec, "A-1", 1.0, 1.0, memory=(100.0, 88.0), memory_kind=kind).memory
        for kind in ("allocated", "reserved", "device")
    }
    assert found == {"allocated": 88.0, "reserved": 92.0, "device": 100.0}


def small_file(path: Path) -> Path:
    """Three rows: one that is priced, one that leaves its batch open, and LoRA."""
    with RUNS.open(newline="") as file:
        reader = csv.DictReader(file)
        row = next(r for r in reader if r["id"] == "MPT-115")
    row |= {"arch_notes": TINY, "seq_len": "1024", "peak_mem_gib": "10"}
    rows = [row, row | {"id": "OPEN-1", "global_batch_seqs": "", "notes": ""}, row | {"id": "LORA-1", "notes": "LoRA"}]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_the_command_reports_a_small_file(
    statistics: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMNICOMPILE_CACHE", str(tmp_path))
    main = import_module("accuracy").main
    path = small_file(tmp_path / "runs.csv")
    assert main(["--runs", str(path), "--json", "--out", str(tmp_path / "results.md")]) == 0
    printed = capsys.readouterr()
    data = json.loads(printed.out)
    assert [r["id"] for r in data["rows"]] == ["MPT-115", "OPEN-1"]
    assert data["skipped"] == [{"id": "LORA-1", "suite": "LORA", "reason": "LoRA"}]
    first = data["rows"][0]
    assert first["predicted_seconds"] > 0 < first["predicted_memory"]
    assert first["ratio"] == pytest.approx(first["predicted_seconds"] / first["measured_seconds"], rel=1e-3)
    assert data["publishers"]["MPT"]["rows"] == 1
    assert "OPEN" not in data["publishers"]
    assert "capturing MPT-760m" in printed.err
    report = (tmp_path / "results.md").read_text()
    assert "2 of 3 rows are predicted: 1 step times that count, 1 that do not" in report
    assert "| LoRA | 1 | LORA 1 |" in report

    assert main(["--runs", str(path), "--explain", "MPT-115"]) == 0
    explained = capsys.readouterr().out
    assert "accumulation=2" in explained
    assert main(["--runs", str(path), "--suite", "OPEN"]) == 0
    assert "1 of 1 rows are predicted" in capsys.readouterr().out


def test_other_constants_are_priced_without_capturing_again(
    statistics: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMNICOMPILE_CACHE", str(tmp_path))
    runs = import_module("published_runs")
    rows = import_module("published_rows").read_rows(small_file(tmp_path / "runs.csv"))
    specs, _ = import_module("published_specs").specs_of(rows)
    captured: list[str] = []
    pricer = runs.Pricer(progress=captured.append)
    first = runs.evaluate(specs, pricer=pricer)
    slow = runs.evaluate(specs, lambda spec, hardware: replace(hardware, kernel_launch_seconds=1e-3), pricer)
    assert captured == ["capturing MPT-760m"]
    assert [o.layout for o in slow] == [o.layout for o in first]
    assert all(b.seconds > 2 * a.seconds for a, b in zip(first, slow))


def test_a_table_of_learned_positions_is_as_long_as_the_sequence(
    statistics: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMNICOMPILE_CACHE", str(tmp_path))
    runs = import_module("published_runs")
    rows = import_module("published_rows").read_rows(small_file(tmp_path / "runs.csv"))
    (spec, _), _ = import_module("published_specs").specs_of(rows)
    program, _ = runs.Pricer().program(spec)
    layers = 2 * (12 * 256**2 + 13 * 256)
    assert program.param_count == 512 * 256 + 1024 * 256 + layers + 2 * 256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "none.csv"], "error: cannot read none.csv"),
        (["--runs", str(RUNS), "--rows", "MPT-0"], f"error: {RUNS}: no row MPT-0"),
        (["--runs", str(RUNS), "--suite", "NOBODY"], f"error: {RUNS}: no rows of NOBODY; there are AUTO"),
    ],
)
def test_a_bad_request_is_one_line(
    statistics: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert import_module("accuracy").main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(message)
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_it_runs_as_a_script(tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("id\n")
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "accuracy.py"), "--runs", str(tmp_path / "bad.csv")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "has no column source" in done.stderr
