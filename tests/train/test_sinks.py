"""What a run shows, and where it writes it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from omnicompile.errors import InputError
from omnicompile.train.records import EvaluationRecord, Report, StepRecord
from omnicompile.train.sinks import JsonLines, Lines, TensorBoard, WandB, step_text

STEP = StepRecord(
    step=12, steps=50, epoch=1, loss=2.5, lr=3e-4, grad_norm=float("inf"), tokens=1000, seconds=0.5,
    tokens_per_second=1234.5, mfu=0.4187, memory=3 * 2**30, fill={"tokens": 0.981, "patches": 0.975},
    losses={"text": 2.25}, skipped=2,
)  # fmt: skip
EVALUATION = EvaluationRecord(step=12, loss=2.75, tokens=4000, seconds=1.5, losses={"image": 0.5})


def test_lines_say_all_of_it() -> None:
    file = io.StringIO()
    report = Report([Lines(file)])
    report.step(STEP)
    report.evaluation(EVALUATION)
    report.event("checkpoint", "checkpoint of step 12", step=12)
    step, evaluation, event = file.getvalue().splitlines()
    for part in (
        "step 12/50", "loss 2.50000", "text 2.2500", "lr 3.00e-04", "norm inf", "1,234 tokens/s/GPU", "MFU 41.9%",
        "3.00 GiB", "98.1% of tokens, 97.5% of patches", "epoch 1", "2 skipped",
    ):  # fmt: skip
        assert part in step, part
    assert evaluation == "evaluation at step 12  loss 2.75000  image 0.5000  4,000 tokens"
    assert event == "checkpoint of step 12"


def test_an_mfu_that_is_not_known_is_a_dash() -> None:
    assert "MFU -" in step_text(StepRecord(**(vars(STEP) | {"mfu": None, "steps": None, "fill": {"tokens": 0.5}})))


def test_json_lines_are_json_whatever_the_numbers() -> None:
    file = io.StringIO()
    report = Report([JsonLines(file)])
    report.step(STEP)
    report.evaluation(EVALUATION)
    report.event("end", "training has ended", step=50)
    step, evaluation, end = map(json.loads, file.getvalue().splitlines())
    assert step["event"] == "step" and step["loss"] == 2.5 and step["grad_norm"] is None
    assert step["fill"] == {"tokens": 0.981, "patches": 0.975}
    assert (evaluation["event"], evaluation["losses"]) == ("evaluation", {"image": 0.5})
    assert end == {"event": "end", "text": "training has ended", "step": 50}


def test_tensorboard_has_every_number(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report = Report([TensorBoard(tmp_path)])
    report.step(STEP)
    report.evaluation(EVALUATION)
    report.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    values = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    assert values["train/loss"] == 2.5 and values["train/loss/text"] == 2.25
    assert values["evaluation/loss"] == 2.75 and values["data/fill/patches"] == pytest.approx(0.975)
    assert values["speed/mfu"] == pytest.approx(0.4187)


def test_a_board_that_is_not_installed_is_an_error_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="pip install wandb"):
        WandB("project", tmp_path, {})
