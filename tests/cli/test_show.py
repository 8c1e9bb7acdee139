"""`omnicompile show`: stages, diffs and folded layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LAYERED = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(64, 16), nn.LayerNorm(16), nn.Linear(16, 64)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)) for _ in range(4))
    def forward(self, input_ids, labels):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return nn.functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())

def build():
    return Net()

def inputs():
    ids = torch.arange(32)[None]
    return {"input_ids": ids, "labels": ids}
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    path = tmp_path / "own.py"
    path.write_text(LAYERED)
    return str(path)


def test_stages_are_listed(run: Callable[..., Any], own: str) -> None:
    stages = run("show", own, "--list").out.split()
    assert stages[0] == "captured" and stages[-2:] == ["lowered", "step"] and "sequence-parallel" in stages


def test_the_lowered_program_has_placements_and_collectives(run: Callable[..., Any], own: str) -> None:
    outcome = run("show", own, "--tiny", "--gpus", "4")
    assert outcome.code == 0, outcome
    for said in (
        "# block text: fsdp, sequence",
        "S(1)",
        "<< param_gather over dp_replicate,dp_shard,sp",
        "<< sp_slice",
    ):
        assert said in outcome.out


def test_layers_fold_unless_asked_for(run: Callable[..., Any], own: str) -> None:
    folded = run("show", own, "--tiny", "--gpus", "2").out
    full = run("show", own, "--tiny", "--gpus", "2", "--full").out
    assert "# layers.1 to layers.3: as layers.0" in folded
    assert "as layers.0" not in full and len(full) > len(folded)


def test_a_diff_has_what_a_pass_added(run: Callable[..., Any], own: str) -> None:
    outcome = run("show", own, "--tiny", "--gpus", "2", "--stage", "parameters", "--diff", "expert-parallel")
    assert outcome.out.startswith("--- expert-parallel\n+++ parameters")
    assert any(line.startswith("+") and "gather_param(" in line for line in outcome.out.splitlines())
    same = run("show", own, "--tiny", "--gpus", "2", "--stage", "expert-parallel", "--diff", "expert-parallel")
    assert same.out == "nothing changed\n"


def test_the_step_has_the_backward(run: Callable[..., Any], own: str) -> None:
    outcome = run("show", own, "--tiny", "--gpus", "2", "--stage", "step")
    assert outcome.code == 0 and "reduce_scatter_tensor(" in outcome.out


def test_full_size(run: Callable[..., Any], own: str) -> None:
    outcome = run("show", own, "--gpus", "2", "--stage", "captured")
    assert outcome.code == 0 and "cross_entropy_loss" in outcome.out


def test_an_unknown_stage_is_refused(run: Callable[..., Any], own: str) -> None:
    outcome = run("show", own, "--tiny", "--stage", "nothing")
    assert outcome.code == 2 and "no stage nothing; there are captured" in outcome.err
