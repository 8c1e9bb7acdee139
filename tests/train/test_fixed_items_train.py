"""`omnicompile train` with sounds, of which a rank sometimes has none: two processes give the losses of one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import runs
import tiny_audio

from omnicompile.cluster import Cluster
from omnicompile.plan import BlockPlan, Layout, Mesh, Plan, Sharding
from omnicompile.workload import Workload

STEPS = 12


def recipe(path: Path, mesh: Mesh, accumulation: int) -> Path:
    block = BlockPlan(Sharding.FSDP, Layout.BATCH)
    plan = Plan(
        model=str(Path(tiny_audio.__file__)), cluster=Cluster(gpus=mesh.world),
        workload=Workload(seq_len=96, audio_seconds=1.0), mesh=mesh,
        blocks={"audio": block, "text": replace(block)}, accumulation=accumulation, param_dtype="float32",
    )  # fmt: skip
    plan.save(path)
    return path


@pytest.mark.slow
def test_two_processes_train_on_sounds_as_one(tmp_path: Path) -> None:
    data = tiny_audio.make_data(tmp_path / "data", 120)
    common = ("--data", str(data), "--steps", str(STEPS), "--set", "optimizer.lr=3e-3")
    one = runs.run(recipe(tmp_path / "one.yaml", Mesh(), 2), *common, "--out", str(tmp_path / "one"))
    two = runs.run(recipe(tmp_path / "two.yaml", Mesh(dp_shard=2), 1), *common, "--out", str(tmp_path / "two"))
    assert one.code == two.code == 0, one.err + two.err
    assert list(one.losses) == list(two.losses) == list(range(1, STEPS + 1))
    assert list(two.losses.values()) == pytest.approx(list(one.losses.values()), abs=1e-4)
    assert two.losses[STEPS] < two.losses[1] - 0.5
    for event in two.named("step"):
        assert set(event["fill"]) >= {"tokens", "clips"} and 0 < event["fill"]["clips"] <= 1


@pytest.mark.slow
def test_the_budget_of_clips_may_be_given(tmp_path: Path) -> None:
    data = tiny_audio.make_data(tmp_path / "data", 40)
    given = tmp_path / "data.yaml"
    given.write_text(f"source: {data}\nbudget: {{items: {{input_features: 5}}}}\n")
    outcome = runs.run(recipe(tmp_path / "two.yaml", Mesh(dp_shard=2), 1), "--data", str(given), "--dry-run")
    assert outcome.code == 0, outcome.err
    assert '"clips": 5' in outcome.out
    given.write_text(f"source: {data}\nbudget: {{items: {{pixel_values: 5}}}}\n")
    outcome = runs.run(recipe(tmp_path / "two.yaml", Mesh(dp_shard=2), 1), "--data", str(given), "--dry-run")
    assert outcome.code == 2 and "samples of the data have those of input_features" in outcome.err
