"""`omnicompile.plan`, the command's twin in code."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import omnicompile
from omnicompile.errors import InputError


def test_a_model_by_name(asked: Any, model: str) -> None:
    plan = omnicompile.plan(model, cluster=omnicompile.Cluster(16), workload=omnicompile.Workload(seq_len=12))
    assert isinstance(plan, omnicompile.Plan)
    assert (plan.model, plan.workload.seq_len) == (model, 12)
    assert (asked.arguments["top"], asked.arguments["cache"], asked.arguments["pins"]) == (1, True, {})


def test_a_module_and_a_function(asked: Any) -> None:
    omnicompile.plan(torch.nn.Linear(2, 2), cluster=omnicompile.Cluster(8), pins={"text.offload": True, "sp": 2})
    assert asked.arguments["pins"] == {"text.offload": "true", "mesh.sp": "2"}
    assert asked.arguments["cache"] is False
    assert asked.arguments["workload"] == omnicompile.Workload()
    omnicompile.plan(lambda: torch.nn.Linear(2, 2), cluster=omnicompile.Cluster(8))
    assert asked.arguments["source"].build_meta().weight.is_meta


def test_the_workload_of_the_file(asked: Any, model: str) -> None:
    with open(model, "a") as file:
        file.write("\ndef workload():\n    return {'seq_len': 10}\n")
    omnicompile.plan(model, cluster=omnicompile.Cluster(8))
    assert asked.arguments["workload"].seq_len == 10


def test_what_is_wrong_is_named(asked: Any, model: str) -> None:
    with pytest.raises(InputError, match="did you mean sp"):
        omnicompile.plan(model, cluster=omnicompile.Cluster(8), pins={"text.spp": 1})
    with pytest.raises(InputError, match="does not exist"):
        omnicompile.plan("missing.py", cluster=omnicompile.Cluster(8))
    with pytest.raises(InputError, match="must be a path, a module or a function"):
        omnicompile.plan(3, cluster=omnicompile.Cluster(8))  # type: ignore[arg-type]
