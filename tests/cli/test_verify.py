"""`omnicompile verify`: exit codes and what is printed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(64, 16), nn.LayerNorm(16), nn.Linear(16, 64)
    def forward(self, input_ids, labels):
        logits = self.head(self.norm(self.embed(input_ids)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

def build():
    return Net()

def inputs():
    ids = torch.arange(32)[None]
    return {"input_ids": ids, "labels": ids}
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    path = tmp_path / "own.py"
    path.write_text(MODEL)
    return str(path)


def test_equal_is_exit_code_0(run: Callable[..., Any], own: str) -> None:
    outcome = run("verify", own, "--gpus", "4")
    assert outcome.code == 0, outcome
    for said in ("equal:", "dp_shard 2 x sp 2", "gather_param", "gradients    5 compared", "embed.weight"):
        assert said in outcome.out


def test_json_and_pins(run: Callable[..., Any], own: str) -> None:
    outcome = run("verify", own, "--gpus", "2", "--pin", "mesh.sp=2", "--dtype", "float32", "--json")
    view = json.loads(outcome.out)
    assert outcome.code == 0 and view["equal"] and view["tolerance"] == 1e-5
    assert view["mesh"]["sp"] == 2 and view["worst"][0]["error"] < 1e-5


def test_not_equal_is_exit_code_1(run: Callable[..., Any], own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import omnicompile.lowering.proof as proof

    monkeypatch.setattr(proof, "relative_errors", lambda got, want: dict.fromkeys(want, 0.5))
    outcome = run("verify", own, "--gpus", "2")
    assert outcome.code == 1 and outcome.out.startswith("NOT EQUAL") and "5.0e-01" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gpus", "0"), "--gpus must be at least 1"),
        (("--gpus", "2", "--pin", "mesh.sp=3"), "does not make up 2"),
        (("--gpus", "2", "--pin", "nothing.sp=3"), "no block 'nothing'"),
        (("--top", "0"), "--top"),
        (("--gpus", "4", "--pin", "mesh.tp=2"), "cannot be executed yet: tp"),
        (("--gpus", "4", "--pin", "text.sharding=zero1"), "only the optimizer's state sharded"),
    ],
)
def test_bad_input_is_exit_code_2(run: Callable[..., Any], own: str, arguments: tuple[str, ...], said: str) -> None:
    outcome = run("verify", own, *arguments)
    assert outcome.code == 2 and said in outcome.err and outcome.err.count("\n") == 1


@pytest.mark.parametrize("command", ["verify", "show"])
def test_a_recipe_that_cannot_be_executed_is_refused(
    run: Callable[..., Any], own: str, tmp_path: Path, command: str
) -> None:
    from omnicompile.cluster import Cluster
    from omnicompile.plan import BlockPlan, Mesh, Plan, Stack
    from omnicompile.workload import Workload

    plan = Plan(own, Cluster(gpus=4), Workload(), Mesh(dp_shard=2, pp=2), {"text": BlockPlan()})
    foreign = replace(plan, mesh=Mesh(dp_shard=4), stack=Stack(gemm_dtype="float8"))
    for wrong, said in ((plan, "pp (mesh.pp=1"), (foreign, "float8")):
        wrong.save(tmp_path / "recipe.yaml")
        outcome = run(command, own, "--recipe", str(tmp_path / "recipe.yaml"))
        assert outcome.code == 2 and said in outcome.err and outcome.err.count("\n") == 1


def test_a_recipe_is_reduced(run: Callable[..., Any], own: str, tmp_path: Path) -> None:
    from omnicompile.cluster import Cluster
    from omnicompile.plan import BlockPlan, Layout, Mesh, Plan, Sharding
    from omnicompile.workload import Workload

    block = BlockPlan(Sharding.HSDP, Layout.SEQUENCE, sp=4)
    mesh = Mesh(dp_replicate=4, dp_shard=4, sp=4)
    Plan(own, Cluster(gpus=64), Workload(), mesh, {"text": block}).save(tmp_path / "recipe.yaml")
    outcome = run("verify", own, "--recipe", str(tmp_path / "recipe.yaml"), "--json")
    view = json.loads(outcome.out)
    assert outcome.code == 0
    assert [view["mesh"][name] for name in ("dp_replicate", "dp_shard", "sp")] == [2, 2, 2]
