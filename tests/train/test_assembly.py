"""What is frozen, and where a model is found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import runs

from omnicompile.plan import Mesh, Plan
from omnicompile.train.assembly import load_model
from omnicompile.train.dry_run import warnings_of
from omnicompile.train.options import TrainOptions
from omnicompile.train.run import Request


def test_a_model_is_looked_for_beside_its_recipe(tmp_path: Path) -> None:
    (tmp_path / "model.py").touch()
    request = Request(tmp_path / "recipe.yaml", "")
    plan = runs.plan(Mesh())
    assert request.model_spec(replace(plan, model="model.py")) == str(tmp_path / "model.py")
    assert request.model_spec(replace(plan, model="model.py:tiny")) == f"{tmp_path / 'model.py'}:tiny"
    assert request.model_spec(replace(plan, model="package.module:Class")) == "package.module:Class"
    assert request.model_spec(plan) == plan.model
    assert Request(tmp_path / "recipe.yaml", "", model="other.py").model_spec(plan) == "other.py"


@pytest.mark.slow
def test_a_frozen_block_is_frozen_on_one_process_too() -> None:
    plan = runs.plan(Mesh())
    plan = replace(plan, blocks=plan.blocks | {"vision": replace(plan.blocks["vision"], frozen=True)})
    model = load_model(Request(Path("r"), ""), plan, TrainOptions(freeze=("lm_head",)), priced=False)
    trained = {name for name, value in model.module.named_parameters() if value.requires_grad}
    names = {name for name, _ in model.module.named_parameters()}
    assert trained == {n for n in names if not n.startswith(("model.visual", "lm_head"))}


def test_a_dry_run_warns_of_what_will_not_fit(sample_plans: list[Plan]) -> None:
    from omnicompile.data.budget import Budget

    plan = sample_plans[0]
    assert plan.prediction is not None
    small, large = Budget(plan.workload.seq_len), Budget(plan.workload.seq_len + 1)
    assert warnings_of(plan, small, plan.prediction, 10**15) == ()
    (wide,) = warnings_of(plan, large, plan.prediction, 10**15)
    assert "1,001 tokens is above the 1,000" in wide
    (full,) = warnings_of(plan, small, plan.prediction, 2**30)
    assert "needs 26.6 GiB per GPU, and the GPU here has 1.0 GiB" in full
    needy = replace(plan.prediction, memory={"parameters": 2.0**50})
    (host,) = warnings_of(plan, small, needy, None)
    assert "8 processes of a node need" in host
