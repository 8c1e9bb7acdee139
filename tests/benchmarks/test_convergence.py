"""The convergence study: what its report demands, that nothing is computed in float32, and fair prompts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture()
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Modules of the study by the ends of their names."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def module(name: str) -> ModuleType:
        return import_module(f"convergence_{name}")

    yield module


def learned(bench: Any, processes: int = 1, steps: int = 200, off: float = 0.0, **setup: Any) -> Any:
    """A run of which everything asked for holds; `off`: added to its losses from the middle on."""
    runs = bench("runs")
    curve = [
        {n: top * 0.98**step + off * (step >= steps // 2) for n, top in (("text", 4.0), ("image", 2.0))}
        for step in range(steps)
    ]
    scores = [runs.Score("text", 60, 64, 1 / 8), runs.Score("drawing", 40, 64, 1 / 16)]
    picture = torch.linspace(-1, 1, 3 * 8 * 8).reshape(3, 8, 8)
    drawn = [runs.Drawn("red square", picture, True)] * 20
    return runs.Run("janus", processes, runs.Setup(steps, **setup), curve, scores, drawn, 12.0)


def lacking(bench: Any, *runs: Any) -> list[str]:
    return bench("report").failures(runs, ["janus"])


def test_nothing_is_missing_of_equal_runs_that_learned(bench: Any) -> None:
    runs = learned(bench), learned(bench, 4, off=9e-4)
    assert lacking(bench, *runs) == []
    assert "Everything asked for holds." in bench("report").report_text(runs, ["janus"])


@pytest.mark.parametrize("off", [1.1e-3, -1.1e-3, math.nan])
def test_curves_that_differ_are_named_with_by_how_much(bench: Any, off: float) -> None:
    found = lacking(bench, learned(bench), learned(bench, 4, off=off))
    assert any("curves on 1 and 4 processes differ" in line for line in found)


def test_a_single_run_is_not_enough(bench: Any) -> None:
    assert "one and several are asked for" in lacking(bench, learned(bench))[0]
    assert "one and several are asked for" in lacking(bench, learned(bench, 4))[0]
    assert "no processes" in lacking(bench)[0]
    assert "one and several" in lacking(bench, learned(bench), learned(bench, 4, dtype="float32"))[0]


def test_runs_of_other_setups_are_not_compared(bench: Any) -> None:
    found = lacking(bench, learned(bench), learned(bench, 4, learning_rate=1e-4))
    assert found == ["janus: runs on 1 and 4 processes were trained differently"]


def test_few_steps_are_not_enough(bench: Any) -> None:
    found = lacking(bench, learned(bench, steps=199), learned(bench, 4, steps=199))
    assert [line for line in found if "fewer than 200" in line] == [
        "janus on 1: 199 steps, fewer than 200", "janus on 4: 199 steps, fewer than 200",
    ]  # fmt: skip


def test_a_loss_that_stays_up_and_a_task_that_is_not_learned_are_named(bench: Any) -> None:
    good, runs = learned(bench), bench("runs")
    flat = replace(good, curve=[losses | {"image": 2.0} for losses in good.curve])
    assert any(
        "decoder loss ends at 2.00, from 2.00" in line for line in lacking(bench, flat, replace(flat, processes=4))
    )
    poor = replace(good, processes=4, scores=[runs.Score("image", 19, 64, 1 / 16)])
    assert lacking(bench, good, poor) == ["janus on 4: image is right 4.8 times as often as chance (p 7e-09)"]
    lucky = replace(good, processes=4, scores=[runs.Score("image", 3, 3, 1 / 8)])
    assert "p 2e-03" in lacking(bench, good, lucky)[0]
    assert lacking(bench, good, replace(poor, scores=[])) == ["janus on 4: not evaluated"]


def test_how_long_float32_stays_together_is_reported(bench: Any) -> None:
    runs = [learned(bench), learned(bench, 4)]
    runs += [learned(bench, 1, dtype="float32"), learned(bench, 4, dtype="float32", off=0.25)]
    assert lacking(bench, *runs) == []
    text = bench("report").report_text(runs, ["janus"])
    assert "stay within 0.001 for the first 100 of 200 steps; they differ by 2.5e-01 at most." in text


def test_runs_are_kept_in_a_file_and_replaced_by_later_ones(bench: Any, tmp_path: Path) -> None:
    runs, file = bench("runs"), tmp_path / "runs.json"
    assert runs.load_runs(file) == []
    first, other = learned(bench), learned(bench, 4)
    runs.save_runs(runs.merged([first], [other]), file)
    again = runs.load_runs(file)
    assert [run.key for run in again] == [("janus", "float64", 1), ("janus", "float64", 4)]
    assert again[0].curve == first.curve and again[0].scores == first.scores and again[0].setup == first.setup
    assert len(again[0].pictures) == runs.KEPT_PICTURES
    torch.testing.assert_close(again[0].pictures[0].picture, first.pictures[0].picture, atol=1 / 255, rtol=0)
    later = replace(first, seconds=99.0)
    assert [run.seconds for run in runs.merged(again, [later])] == [99.0, 12.0]


def test_the_report_is_written_from_the_file(bench: Any, tmp_path: Path) -> None:
    bench("runs").save_runs([learned(bench), learned(bench, 4)], tmp_path / "runs.json")
    bench("report").write_report(bench("runs").load_runs(tmp_path / "runs.json"), tmp_path, ["janus"])
    assert "| janus | 1 | 200 | 4.00 to" in (tmp_path / "convergence.md").read_text()
    for name in ("convergence.png", "convergence_samples.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_every_answer_is_asked_for_equally_often(bench: Any) -> None:
    model = bench("models").initial_model("llama_omni")
    for task in bench("data").tasks_of(model):
        answers = Counter(answer for _, answer in task.prompts(model, 32, 1))
        assert len(answers) == task.answers and set(answers.values()) == {32 // task.answers}
    with pytest.raises(ValueError, match="equally often"):
        task.prompts(model, 20, 1)


class _Narrowed(TorchDispatchMode):
    """Operators that made a float32 tensor of a float64 one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        wide = any(isinstance(a, torch.Tensor) and a.dtype is torch.float64 for a in args)
        if wide and isinstance(result, torch.Tensor) and result.dtype is torch.float32:
            self.found.add(str(func))
        return result


@pytest.mark.parametrize("name", ["janus", "llama_omni", "qwen3_moe_omni"])
def test_nothing_is_computed_in_float32(bench: Any, name: str) -> None:
    models, wide = bench("models"), bench("precision").NothingInFloat32
    model = models.initial_model(name).double().train()
    model.set_experts_implementation("eager")
    batch = models.micro_batch(model, 3, 0)
    with _Narrowed() as without:
        model(**batch).loss.backward()
    assert without.found  # the norms and the loss
    with wide(), _Narrowed() as within:
        output = model(**batch)
        output.loss.backward()
    assert within.found == set()
    assert {loss.dtype for loss in output.losses.values()} == {torch.float64}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["janus", "qwen3_moe_omni"])
def test_a_few_steps_on_four_processes_are_those_of_one(bench: Any, name: str) -> None:
    runs, study = bench("runs"), import_module("convergence")
    setup = runs.Setup(steps=4, warmup=2)
    one, four = study.run(name, 1, setup, 32), study.run(name, 4, setup, 32)
    assert max(runs.differences(one, four)) < 1e-11
    assert one.scores == four.scores and len(four.pictures) == 32
    assert one.curve[-1]["text"] < one.curve[0]["text"]
