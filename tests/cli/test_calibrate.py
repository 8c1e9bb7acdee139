"""`omnicompile calibrate`: what it refuses, what it writes, and that a plan takes the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from omnicompile.cost_model.hardware import load_hardware

MODEL = """
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


def build():
    return Model()


def inputs(workload):
    return {"x": torch.zeros(2, workload.seq_len, 64)}
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "mine.txt"], "--out must end with .yaml"),
        (["--out", "nowhere/mine.yaml"], "there is no folder nowhere"),
        (["--nproc", "0"], "--nproc must be at least 1, got 0"),
        (["--name", "a b"], "--name may hold letters"),
    ],
)
def test_wrong_options_are_refused_at_once(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run("calibrate", *arguments)
    assert outcome.code == 2 and outcome.out == ""
    assert message in outcome.err and outcome.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_write_a_file_that_plans_use(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    outcome = run("calibrate", "--quick", "--nproc", "2", "--name", "here", "--out", str(path), "--json")
    assert outcome.code == 0, outcome.err
    data = json.loads(outcome.out)
    hardware = load_hardware(str(path))
    assert hardware.name == "here" and hardware.collective.ring > 0 and data["file"] == str(path)
    assert {"memory", "GEMM", "attention", "collectives"} <= {found["group"] for found in data["errors"]}
    assert len(data["measured"]["collectives"]) >= 8
    model = tmp_path / "model.py"
    model.write_text(MODEL)
    planned = run(
        "plan",
        str(model),
        "--gpus",
        "2",
        "--gpus-per-node",
        "2",
        "--gpu",
        str(path),
        "--pin",
        "param_dtype=float32",
        "--json",
    )
    assert planned.code == 0, planned.err
    assert json.loads(planned.out)["plan"]["prediction"]["step_seconds"] > 0
