"""The script that measures planning: its process runner and verdicts, and one cold plan of a small model."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture()
def plan_time(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("plan_time")


def test_a_process_is_measured(plan_time: ModuleType, tmp_path: Path) -> None:
    script = "import os; x = bytearray(50 * 2**20); print(os.environ['OMNICOMPILE_CACHE'])"
    run = plan_time.run_process([sys.executable, "-c", script], tmp_path)
    assert not run.error and run.output.strip() == str(tmp_path)
    assert run.rss > 50 and run.wall > 0 and run.cpu > 0
    failed = plan_time.run_process([sys.executable, "-c", "raise SystemExit('it broke')"], tmp_path)
    assert "it broke" in failed.error


def test_verdicts(plan_time: ModuleType) -> None:
    verdict = plan_time.Verdict("x", 12.0, 10.0, "s", 9.0)
    assert (verdict.word(busy=False), verdict.word(busy=True)) == ("FAIL", "PASS (by CPU)")
    assert plan_time.Verdict("x", float("nan"), 10.0, "s").word(busy=False) == "FAIL"
    assert plan_time.Verdict("x", None, 59.0, "s", 9.0).word(busy=False) == "PASS"


def test_modules_are_listed_and_imported(plan_time: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "modules.json"
    file.write_text(json.dumps(["json", "no_such_module"]))
    assert plan_time.import_modules(file) == 0


def test_a_cold_plan(plan_time: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--only", "cold", "--repeats", "1", "--model", "examples/custom_model.py", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["plan_time.py", *arguments])
    plan_time.main()  # whether targets are met is not for a loaded test machine to say
    data = json.loads((tmp_path / "plan_time.json").read_text())
    (run,) = data["measured"]["cold"]["runs"]
    assert not run["error"] and 0 < run["rss"] < 2048
    assert "peak memory" in (tmp_path / "plan_time.md").read_text()
