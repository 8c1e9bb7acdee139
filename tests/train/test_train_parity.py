"""`omnicompile train` on four processes gives the losses of one: images and text, FSDP with sequence parallelism."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import runs

STEPS = 50


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_four_processes_train_as_one(tmp_path: Path) -> None:
    make = [sys.executable, str(runs.EXAMPLE / "make_data.py"), str(tmp_path / "data"), "--samples", "400"]
    subprocess.run(make, check=True, capture_output=True)
    data = ("--data", str(tmp_path / "data" / "train.jsonl"), "--steps", str(STEPS))
    one = runs.run(runs.EXAMPLE / "one_process.yaml", *data, "--out", str(tmp_path / "one"), seconds=800)
    four = runs.run(runs.EXAMPLE / "recipe.yaml", *data, "--out", str(tmp_path / "four"), seconds=800)
    assert one.code == four.code == 0, one.err + four.err
    assert list(one.losses) == list(four.losses) == list(range(1, STEPS + 1))
    assert list(four.losses.values()) == pytest.approx(list(one.losses.values()), abs=1e-4)
    assert four.losses[STEPS] < four.losses[1] - 1.5
    for event in four.named("step")[:-1]:
        assert event["fill"]["tokens"] > 0.9 and event["mfu"] is None
