"""`omnicompile.parallelize`: the same model, distributed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from omnicompile.errors import InputError, PlanError
from omnicompile.lowering.driver import Lower, default_lower
from omnicompile.lowering.graph_capture import DEFAULT_SEGMENTS
from omnicompile.plan import Plan
from omnicompile.runtime.agreement import require_same
from omnicompile.runtime.backends import BACKENDS
from omnicompile.runtime.budget import Budget
from omnicompile.runtime.engine import Engine, batch_signature
from omnicompile.runtime.mesh import build_mesh, pick_device
from omnicompile.runtime.parallel_module import ParallelModule, to_host
from omnicompile.runtime.plain_module import PlainModule
from omnicompile.support import not_executable


def parallelize(
    model: nn.Module,
    plan: Plan | None = None,
    device_type: str | None = None,
    example_batch: Mapping[str, Any] | None = None,
    backend: str = "eager",
    master_dtype: torch.dtype = torch.float32,
    segments: int = DEFAULT_SEGMENTS,
    lower: Lower = default_lower,
) -> ParallelModule | PlainModule:
    """Distribute `model` under `plan` over the processes that torchrun started.

    model: with its weights, the same on every rank; it is not changed. plan: None only with one process, where the
    plain model is returned. device_type: "cuda", "cpu", or None for what there is. example_batch: a batch of the budget
    that training batches have; its values do not matter. backend: "inductor" compiles forward and backward as one
    graph, "step" runs that graph as it is, "torch.compile" hands the rewritten forward to torch.compile, "eager" runs
    it under autograd. master_dtype: of the stored parameters. segments: most images or windows in a batch.

    Raises PlanError when the processes do not fit the plan, LoweringError when the plan cannot be executed or ranks
    disagree, CaptureError when the model cannot be traced.
    """
    if backend not in BACKENDS:
        raise InputError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if plan is not None and (unsupported := not_executable(plan)):
        raise PlanError(f"the plan asks for what cannot be executed yet: {'; '.join(unsupported)}")
    if plan is None or plan.mesh.world == 1:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError("give parallelize a plan for these processes: omnicompile.plan(...) makes one")
        return PlainModule(model.to(pick_device(device_type)))
    if example_batch is None:
        raise InputError("give parallelize an example_batch of the budget that training batches are padded to")
    mesh = build_mesh(plan.mesh, device_type)
    facts = {
        "plan": str(_plan_lines(plan)),
        "model": "\n".join(f"{n} {tuple(p.shape)} {p.dtype} {p.requires_grad}" for n, p in model.named_parameters()),
        "backend": backend,
    }
    require_same(facts, mesh.control)
    engine = Engine(model, plan, mesh, lower, BACKENDS[backend], master_dtype, segments)
    batch = to_host(example_batch)
    loaded = engine.program(batch, batch_signature(batch, model.training), logits=False)
    budget = Budget.of(model, batch)
    module = ParallelModule(engine, loaded.program.params, dict(model.named_parameters()), budget)
    return module.train(model.training)


def _plan_lines(plan: Plan) -> str:
    """The choices that decide what runs, one a line."""
    lines = [f"mesh {plan.mesh}", f"micro-batch {plan.micro_batch}", f"loss head {plan.loss_head}"]
    lines += [f"dtype {plan.param_dtype}, gradients {plan.reduce_dtype}"]
    lines += [f"block {name}: {choices}" for name, choices in sorted(plan.blocks.items())]
    return "\n".join(lines)
