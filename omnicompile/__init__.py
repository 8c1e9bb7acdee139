"""OmniCompile: plan, rewrite and run the distributed training of omni-modal PyTorch models.

    plan = omnicompile.plan("model.py", cluster=omnicompile.Cluster(gpus=128))
    print(plan)
    plan.save("recipe.yaml")

Importing this package is cheap: torch and transformers are imported by the call that needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from omnicompile.cluster import Cluster
from omnicompile.errors import OmniCompileError
from omnicompile.plan import BlockPlan, Mesh, Plan
from omnicompile.workload import Workload

if TYPE_CHECKING:
    import torch

    from omnicompile.planner.predict import simulate
    from omnicompile.recipe import load_recipe
    from omnicompile.runtime.parallelize import parallelize

__all__ = [
    "BlockPlan",
    "Cluster",
    "Mesh",
    "OmniCompileError",
    "Plan",
    "Workload",
    "load_recipe",
    "parallelize",
    "plan",
    "simulate",
]

_LAZY: Mapping[str, str] = {
    "load_recipe": "omnicompile.recipe",
    "parallelize": "omnicompile.runtime.parallelize",
    "simulate": "omnicompile.planner.predict",
}


# The function replaces the attribute that importing the submodule `omnicompile.plan` (above, once) has set.
def plan(  # type: ignore[no-redef]
    model: str | Path | torch.nn.Module | Callable[[], torch.nn.Module],
    cluster: Cluster,
    workload: Workload | None = None,
    pins: Mapping[str, object] | None = None,
    config: str | Path | None = None,
) -> Plan:
    """The fastest plan that fits, for `model` on `cluster`.

    model: what the command line takes (a path or an import name), a module, or a function that builds one.
    pins: choices to keep, such as `{"vision.sp": 1, "mesh.sp": 4}`.
    config: a config.json, for a model named by its class. workload: None takes that of the model's file, if any.
    Raises InputError, CaptureError, PlanError or InfeasibleError.
    """
    from omnicompile.capture.source import source_of
    from omnicompile.planner.api import plan_source
    from omnicompile.recipe import check_pins

    source = source_of(model, None if config is None else str(config))
    texts = check_pins({key: str(value) for key, value in (pins or {}).items()})
    load = workload or source.workload or Workload()
    result = plan_source(source, cluster, load, texts, top=1, cache=source.cacheable, progress=lambda line: None)
    return result.plans[0]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'omnicompile' has no attribute {name!r}")
    from importlib import import_module

    return vars(import_module(_LAZY[name]))[name]


def __dir__() -> list[str]:
    return sorted(__all__)
