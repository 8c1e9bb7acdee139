"""`omnicompile show`: stages, diffs and folded layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .test_verify import MODEL

LAYERED = MODEL.replace(
    "self.embed, self.norm",
    "self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))\n        self.embed, self.norm",
).replace(
    "logits = self.head(self.norm(self.embed(input_ids)))",
    "x = self.embed(input_ids)\n        for layer in self.layers:\n            x = layer(x)\n"
    "        logits = self.head(self.norm(x))",
)


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
