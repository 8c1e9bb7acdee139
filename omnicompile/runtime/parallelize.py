"""`omnicompile.parallelize`: the same model, distributed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import omnicompile
from omnicompile.cluster import Cluster
from omnicompile.errors import InputError, OmniCompileError, PlanError
from omnicompile.kernels.choice import KernelChoice, parse_kernels
from omnicompile.lowering.driver import Lower, default_lower, dtype_named
from omnicompile.lowering.graph_capture import DEFAULT_SEGMENTS
from omnicompile.passes.rank_program import RankProgram
from omnicompile.plan import LossHead, Plan
from omnicompile.recompute import Recompute
from omnicompile.runtime.agreement import (
    found_by_first,
    installed_versions,
    model_structure,
    require_same,
    weight_samples,
)
from omnicompile.runtime.backends import BACKENDS
from omnicompile.runtime.budget import Budget
from omnicompile.runtime.engine import Engine, batch_signature
from omnicompile.runtime.loading import Pretrained
from omnicompile.runtime.mesh import TIMEOUT, RuntimeMesh, build_mesh, control_group, pick_device, start_processes
from omnicompile.runtime.packing import image_ranks, needs_dealing
from omnicompile.runtime.parallel_module import ParallelModule, to_host
from omnicompile.runtime.plain_module import PlainModule
from omnicompile.runtime.state import specs_of_all
from omnicompile.runtime.weights import Given, Initialized, Values, materialized, on_meta, with_real_buffers
from omnicompile.support import refuse_unexecutable
from omnicompile.workload import Workload


def parallelize(
    model: nn.Module,
    plan: Plan | None = None,
    device_type: str | None = None,
    example_batch: Mapping[str, Any] | None = None,
    backend: str | None = None,
    master_dtype: torch.dtype | None = None,
    segments: int = DEFAULT_SEGMENTS,
    seed: int = 0,
    lower: Lower = default_lower,
    timeout: float = TIMEOUT,
    weights: str | Path | None = None,
    kernels: str | Mapping[str, str] | None = None,
) -> ParallelModule | PlainModule:
    """Distribute `model` under `plan` over the processes that torchrun started.

    model: with its weights, the same on every rank, or on the meta device; it is not changed. weights: of a model on
    the meta device, a folder as Hugging Face's save_pretrained writes it, of which each rank reads its own parts; None:
    the model's own initialization gives the values (from `seed`). plan: None plans first, for these processes and
    this budget; with one process the plain model is returned, unless the plan asks for what it does not do: another
    compute dtype than `master_dtype`, recomputing, another loss head, offload. device_type: "cuda", "cpu", or
    None for what there is. example_batch: a batch of the budget that training batches have; its values do not matter.
    backend: "inductor" (None on GPUs) compiles forward and backward as one graph, "step" (None on CPUs) runs that graph
    as it is, "torch.compile" hands the rewritten forward to torch.compile, "eager" runs it under autograd.
    master_dtype: of stored parameters (None: float32, or the plan's compute dtype where that is wider).
    segments: most images or windows in a batch. timeout: seconds that a rank waits for the others in a collective.
    kernels: implementations of operators by name, "rms_norm=liger,..." or {"rms_norm": "liger"} (docs/kernels.md); for
    all others, what is fastest on the present GPU is taken.

    Raises PlanError when the processes do not fit the plan, LoweringError when the plan cannot be executed or ranks
    disagree, CaptureError when the model cannot be traced, RankError when another rank has died or failed.
    """
    device = pick_device(device_type)
    backend = backend or ("inductor" if device.type == "cuda" else "step")
    if backend not in BACKENDS:
        raise InputError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if plan is None and _processes() > 1:
        plan = _plan_together(model, device_type, example_batch, timeout)
    if plan is not None:
        refuse_unexecutable(plan)
    forced = parse_kernels(kernels)
    if plan is None and forced:
        raise InputError("give parallelize the plan that the kernels are for; without one the plain model runs")
    if plan is None or (
        plan.mesh.world == _processes() == 1 and _is_plain(plan, master_dtype or torch.float32) and not forced
    ):
        values = _values(model, weights, seed)
        return PlainModule((materialized(model, values) if on_meta(model) else model).to(device))
    if example_batch is None:
        raise InputError("give parallelize an example_batch of the budget that training batches are padded to")
    mesh = build_mesh(plan.mesh, device_type, timeout)
    with mesh.watch.guard("parallelize"):
        values = _values(model, weights, seed)
        choice = KernelChoice.of(forced, device, found_by_first(mesh.control))
        lower = partial(_lower_with, lower, choice)
        stored = master_dtype or torch.promote_types(dtype_named(plan.param_dtype), torch.float32)
        return _distributed(model, plan, mesh, example_batch, backend, stored, segments, values, lower)


def _lower_with(lower: Lower, choice: KernelChoice, program: RankProgram) -> RankProgram:
    return lower(replace(program, kernels=choice))


def _distributed(
    model: nn.Module,
    plan: Plan,
    mesh: RuntimeMesh,
    example_batch: Mapping[str, Any],
    backend: str,
    master_dtype: torch.dtype,
    segments: int,
    values: Values,
    lower: Lower,
) -> ParallelModule:
    batch = to_host(example_batch)
    facts = {
        "plan": str(plan_lines(plan)),
        "versions": installed_versions(),
        "model": model_structure(model),
        "options": f"backend {backend}\nmaster_dtype {master_dtype}\nsegments {segments}",
        "shapes of the example batch": batch_signature(batch, model.training),
        "weights": f"{weight_samples(model)}\n{values.described()}",
    }
    require_same(facts, mesh.control)
    if on_meta(model):
        model = with_real_buffers(model, values)
    engine = Engine(model, plan, mesh, lower, BACKENDS[backend], master_dtype, segments)
    budget = Budget.of(model, batch, image_ranks(plan, model))
    loaded = engine.program(batch, batch_signature(batch, model.training), logits=False)
    if needs_dealing(loaded.program) and budget.images is None:
        raise PlanError("layout 'images' needs the sizes of images in `image_grid_thw`: use layout 'sequence'")
    specs = specs_of_all(model, loaded.program.params, master_dtype)
    module = ParallelModule(engine, specs, values, budget)
    return module.train(model.training)


def _values(model: nn.Module, weights: str | Path | None, seed: int) -> Values:
    if not on_meta(model):
        if weights is not None:
            raise InputError(f"weights={str(weights)!r} are for a model on the meta device, and this one has its own")
        return Given(dict(model.named_parameters()))
    return Initialized(model, seed) if weights is None else Pretrained.of(model, weights, seed)


def _is_plain(plan: Plan, master_dtype: torch.dtype) -> bool:
    """Whether a single process that runs the plain model does all that the plan says."""
    return (
        plan.param_dtype == str(master_dtype).removeprefix("torch.")
        and plan.loss_head is LossHead.FULL
        and not plan.offload_optimizer
        and not any(block.offload or block.recompute is not Recompute.NONE for block in plan.blocks.values())
    )


def _processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def _plan_together(
    model: nn.Module, device_type: str | None, example: Mapping[str, Any] | None, timeout: float
) -> Plan:
    """The planner's choice for the processes at hand, made on rank 0 for all."""
    if example is None:
        raise InputError("give parallelize an example_batch of the budget that training batches are padded to")
    device = start_processes(device_type, timeout)
    assert device is not None
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found[0] = omnicompile.plan(model, _cluster(device), _workload(example))
        except OmniCompileError as error:
            found[0] = error
    dist.broadcast_object_list(found, src=0, group=control_group(timeout))
    if isinstance(found[0], OmniCompileError):
        raise found[0]
    return found[0]


def _cluster(device: torch.device) -> Cluster:
    world = dist.get_world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(world)))
    name = torch.cuda.get_device_name(device).lower() if device.type == "cuda" else ""
    known = next((gpu for gpu in ("h200", "h100", "h800", "b200", "a100") if gpu in name), "h100")
    return Cluster(gpus=world, gpu=known, gpus_per_node=local)


def _workload(example: Mapping[str, Any]) -> Workload:
    """One sample as long as the budget, with the example's number of images."""
    ids, grids = example.get("input_ids"), example.get("image_grid_thw")
    if not isinstance(ids, Tensor):
        raise InputError("the example_batch has no input_ids: make a plan with omnicompile.plan and give it")
    images = grids.shape[0] if isinstance(grids, Tensor) else (0 if "pixel_values" not in example else None)
    return Workload(seq_len=ids.shape[-1], images=images)


def plan_lines(plan: Plan) -> str:
    """The choices that decide what runs, one a line."""
    lines = [f"mesh {plan.mesh}", f"micro-batch {plan.micro_batch}", f"loss head {plan.loss_head}"]
    lines += [f"dtype {plan.param_dtype}, gradients {plan.reduce_dtype}", f"{plan.overlap}"]
    lines += [f"optimizer on the {'host' if plan.offload_optimizer else 'device'}"]
    lines += [f"block {name}: {choices}" for name, choices in sorted(plan.blocks.items())]
    return "\n".join(lines)
