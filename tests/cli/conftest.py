"""The command line with a planner that answers at once and notes what it was asked."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import omnicompile.capture
import omnicompile.planner
from omnicompile.cli.main import main
from omnicompile.plan import Plan
from omnicompile.program import Program


@dataclass
class Asked:
    """The arguments of the last call of the planner, and what it raises, if anything."""

    which: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    error: BaseException | None = None


@dataclass(frozen=True)
class FakeResult:
    plans: list[Plan]
    program: Program
    explored: int
    seconds: dict[str, float]
    lost_because: list[str]
    simulated: int = 56


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, sample_plans: list[Plan], sample_program: Program) -> Iterator[Asked]:
    """Puts a fake `planner.api` and `capture.api` in place of the real ones."""
    record = Asked()

    def answer(which: str) -> Callable[..., FakeResult]:
        def call(
            source: Any, cluster: Any, workload: Any, pins: Any, top: int, cache: bool, progress: Callable[[str], None]
        ) -> FakeResult:
            record.which = which
            record.arguments = {"source": source, "cluster": cluster, "workload": workload, "pins": pins}
            record.arguments |= {"top": top, "cache": cache}
            progress("working")
            if record.error is not None:
                raise record.error
            plans = [replace(plan, model=source.spec, workload=workload) for plan in sample_plans][:top]
            reasons = ["", "more all-to-all", "more compute"][: len(plans)]
            return FakeResult(plans, sample_program, 1234, {"capture": 2.5, "search": 0.25}, reasons)

        return call

    def capture_program(source: Any, workload: Any, cache: bool, progress: Callable[[str], None]) -> Program:
        record.which = "capture"
        record.arguments = {"source": source, "workload": workload, "cache": cache}
        return sample_program

    planner, capture = ModuleType("omnicompile.planner.api"), ModuleType("omnicompile.capture.api")
    vars(planner).update({name: answer(name) for name in ("plan_source", "min_gpus", "max_seq_len")})
    vars(capture).update({"capture_program": capture_program})
    for package, module in ((omnicompile.planner, planner), (omnicompile.capture, capture)):
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(package, "api", module, raising=False)
    yield record


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process: exit code, stdout, stderr."""

    def call(*arguments: str) -> Outcome:
        code = main(arguments)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "model.py"
    path.write_text("def build():\n    import torch\n    return torch.nn.Linear(2, 2)\n")
    return str(path)
