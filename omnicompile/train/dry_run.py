"""Everything that can be checked of a run without training: recipe, model, data, first packs, memory."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from omnicompile.plan import Plan, Prediction
from omnicompile.train.run import Request, check_request

if TYPE_CHECKING:
    from omnicompile.data.budget import Budget

_STEPS = 8


@dataclass(frozen=True)
class DryRun:
    """fill: of the first steps, as shares by kind. tokens: real ones of a step. attention: of the costliest rank over
    the mean. skipped: samples by cause. memory: bytes per GPU by the cost model; capacity: of the recipe's GPU;
    machine: of the GPU here, None without one. host: bytes of memory here. trained, parameters: of the model."""

    model: str
    parameters: int
    trained: int
    samples: int
    budget: dict[str, int]
    steps: int
    fill: dict[str, float]
    tokens: float
    attention: float
    skipped: dict[str, int]
    memory: float
    capacity: float
    machine: int | None
    host: int
    gpu: str
    warnings: tuple[str, ...]


def dry_run(request: Request, plan: Plan, as_json: bool = False) -> str:
    """A report to read, or JSON. Raises what the run itself would raise."""
    found = inspect_run(request, plan)
    return json.dumps(vars(found) | {"warnings": list(found.warnings)}, indent=2) if as_json else dry_run_text(found)


def inspect_run(request: Request, plan: Plan) -> DryRun:
    """In this process alone, as data rank 0 of the recipe."""
    from omnicompile.capture.api import capture_program
    from omnicompile.planner.predict import simulate
    from omnicompile.train.assembly import load_model
    from omnicompile.train.data import open_data
    from omnicompile.train.optimizer import make_optimizer
    from omnicompile.train.run import processor_of

    options = check_request(request, plan)
    plan = plan if options.accumulation is None else replace(plan, accumulation=options.accumulation)
    model = load_model(request, plan, options, priced=False)
    make_optimizer(model.module, options.optimizer)
    make_processor = processor_of(request, model.source.spec)
    data = open_data(request.data, make_processor, model.module, plan)
    loader = data.loader(model.module, plan, 0, options.seed, options.epochs or 1)
    steps = list(islice(loader, _STEPS))
    loader.example_batch()
    if options.evaluation.data is not None:
        other = open_data(options.evaluation.data, make_processor, model.module, plan, like=data)
        next(iter(other.loader(model.module, plan, 0, options.seed, 1, shuffle=False)))
    program = model.program or capture_program(model.source, plan.workload)
    workload = replace(plan.workload, global_batch=plan.global_batch)
    prediction = simulate(program, replace(plan, workload=workload)).prediction
    assert prediction is not None
    parameters = list(model.module.parameters())
    return DryRun(
        model=model.source.name,
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        samples=len(data.source),
        budget={"tokens": data.budget.tokens, "patches": data.budget.patches, "frames": data.budget.frames}
        | {item.word: item.count for item in data.budget.items},
        steps=len(steps),
        fill={kind: sum(s.fill[kind] for s in steps) / len(steps) for kind in steps[0].fill},
        tokens=sum(s.real_tokens for s in steps) / len(steps),
        attention=max(s.attention for s in steps),
        skipped=loader.skipped,
        memory=prediction.memory_total,
        capacity=prediction.memory_capacity,
        machine=_gpu_bytes(request.device),
        host=_host_bytes(),
        gpu=plan.cluster.gpu,
        warnings=warnings_of(plan, data.budget, prediction, _gpu_bytes(request.device)),
    )


def _gpu_bytes(device: str | None) -> int | None:
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(0).total_memory)


def _host_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def warnings_of(plan: Plan, budget: Budget, prediction: Prediction, machine: int | None) -> tuple[str, ...]:
    from omnicompile.report.units import gib

    found = []
    planned = plan.workload.seq_len * plan.micro_batch
    if budget.tokens > planned:
        found.append(
            f"the budget of {budget.tokens:,} tokens is above the {planned:,} that the recipe was planned for: memory "
            "and time are those of the plan"
        )
    memory = prediction.memory_total
    if machine is not None and memory > machine:
        found.append(f"the plan needs {gib(memory)} per GPU, and the GPU here has {gib(machine)}: it will not fit")
    tensors = memory - sum(prediction.memory.get(kind, 0.0) for kind in ("context", "allocator slack"))
    ranks = min(plan.mesh.world, plan.cluster.gpus_per_node)
    if machine is None and tensors * ranks > _host_bytes():
        found.append(
            f"without a GPU the {ranks} processes of a node need {gib(tensors * ranks)}, and this one has "
            f"{gib(_host_bytes())}: it will not fit"
        )
    return tuple(found)


def dry_run_text(found: DryRun) -> str:
    from omnicompile.report.units import count_text, gib

    trained = "" if found.trained == found.parameters else f", {count_text(found.trained)} trained"
    fill = ", ".join(f"{share:.1%} of {kind}" for kind, share in found.fill.items())
    budget = ", ".join(f"{size:,} {kind}" for kind, size in found.budget.items() if size)
    skipped = ", ".join(f"{count} {cause.replace('_', '-')}" for cause, count in found.skipped.items() if count)
    here = f"{gib(found.machine)} per GPU here" if found.machine else f"no GPU here, {gib(found.host)} of host memory"
    lines = [
        "dry run: nothing was trained",
        f"  model    {found.model}: {count_text(found.parameters)} parameters{trained}",
        f"  data     {found.samples:,} samples" + (f" ({skipped} skipped so far)" if skipped else ""),
        f"  budget   {budget} a micro-batch",
        f"  packs    first {found.steps} steps: {fill} real; {found.tokens:,.0f} tokens a step; attention of the "
        f"costliest rank {found.attention:.2f} of the mean",
        f"  memory   {gib(found.memory)} of {gib(found.capacity)} per {found.gpu} by the cost model; {here}",
    ]
    return "\n".join(lines + [f"  warning  {text}" for text in found.warnings])
