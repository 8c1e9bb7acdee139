"""Puts the parts of a run together: model, data, module, optimizer, checkpoints, trainer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import omnicompile
from omnicompile.capture.api import capture_program
from omnicompile.capture.source import ModelSource, load_model_source
from omnicompile.checkpoint.checkpointer import Checkpointer
from omnicompile.checkpoint.export import export_huggingface
from omnicompile.cost_model.hardware import load_hardware
from omnicompile.data.loader import PackedLoader
from omnicompile.errors import InputError, PlanError
from omnicompile.plan import Plan
from omnicompile.program import Program
from omnicompile.report.units import count_text, plural
from omnicompile.runtime.mesh import control_group, pick_device
from omnicompile.train.data import Data, open_data
from omnicompile.train.flops import StepFlops, block_parameters, frozen_blocks
from omnicompile.train.freezing import freeze
from omnicompile.train.meter import Cost
from omnicompile.train.optimizer import make_optimizer
from omnicompile.train.options import TrainOptions
from omnicompile.train.protocols import Checkpointer as Checkpoints
from omnicompile.train.records import Report
from omnicompile.train.run import Request, processor_of
from omnicompile.train.sample_log import SampleLog
from omnicompile.train.stop import StopRequest
from omnicompile.train.trainer import Trainer
from omnicompile.train.work import work_of


@dataclass(frozen=True)
class Run:
    trainer: Trainer
    data: Data
    loader: PackedLoader

    def export(self, folder: str) -> None:
        """Write the model as Hugging Face safetensors, with its processor."""
        export_huggingface(self.trainer.module, folder, self.data.processor)
        self.trainer.report.event("export", f"model written to {folder}", path=folder)


@dataclass(frozen=True)
class Model:
    """source: as the user named it. module: on the meta device, in training, with what is frozen marked. program:
    traced, where something needs its operators."""

    source: ModelSource
    module: nn.Module
    program: Program | None


def load_model(request: Request, plan: Plan, options: TrainOptions, priced: bool) -> Model:
    """priced: the operators are needed for FLOPs. Raises PlanError where the plan freezes what the model has not."""
    source = load_model_source(request.model_spec(plan), request.config)
    module = source.build_meta().train()
    frozen = [name for name, block in plan.blocks.items() if block.frozen]
    needed = (priced and source.inputs is None) or bool(frozen and plan.mesh.world == 1)
    program = capture_program(source, plan.workload) if needed else None
    if program is not None:  # what distributes the model freezes blocks itself; the plain model has to be told
        parameters = block_parameters(program)
        if unknown := sorted(set(frozen) - set(parameters)):
            raise PlanError(
                f"the recipe freezes the block {unknown[0]}, and the model has {', '.join(parameters)}: plan it again"
            )
        names = {name for block in frozen for name in parameters[block]}
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name not in names)
    freeze(module, options.freeze)
    return Model(source, module, program)


def assemble(request: Request, plan: Plan, options: TrainOptions, stop: StopRequest, report: Report) -> Run:
    """All ranks together. Raises what a user can mend on every rank."""
    device = pick_device(request.device)
    torch.manual_seed(options.seed)
    model = load_model(request, plan, options, priced=device.type == "cuda")
    make_processor = processor_of(request, model.source.spec)
    data = open_data(request.data, make_processor, model.module, plan)
    group = control_group() if dist.is_initialized() else None
    rank = dist.get_rank() if group is not None else 0
    data_rank = rank // plan.mesh.sp
    epochs = options.epochs or (1 if options.steps is None else None)
    loader = data.loader(model.module, plan, data_rank, options.seed, epochs, group=group)
    evaluation = None
    if options.evaluation.data is not None:
        other = open_data(options.evaluation.data, make_processor, model.module, plan, like=data)
        evaluation = other.loader(model.module, plan, data_rank, options.seed, 1, shuffle=False, group=group)
    module = omnicompile.parallelize(
        model.module, plan, device.type, example_batch=loader.example_batch(), backend=request.backend,
        segments=data.budget.segments, seed=options.seed, weights=request.weights, kernels=request.kernels,
    )  # fmt: skip
    checkpointer = None if request.checkpoints is None else Checkpointer(request.checkpoints, options.keep_last)
    log = options.log_samples and rank == 0 and request.out is not None
    trainer = Trainer(
        module, make_optimizer(module, options.optimizer), loader, options, checkpointer, evaluation, report,
        cost=_cost(model, module, plan, device),
        sample_log=SampleLog(request.out / "samples.jsonl") if log and request.out is not None else None,
        profile=None if request.profile is None or request.out is None else (request.profile, request.out / "profile"),
        name_of=data.name_of, stop=stop,
    )  # fmt: skip
    _tell_start(report, model, module, plan, data)
    resume(trainer, request)
    return Run(trainer, data, loader)


def _cost(model: Model, module: nn.Module, plan: Plan, device: torch.device) -> Cost | None:
    """FLOPs of real tokens, where there is a GPU to compare them with."""
    if model.program is None or device.type != "cuda":
        return None
    trained = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    flops = StepFlops(model.program, frozen_blocks(model.program, trained))
    return Cost(flops, work_of, load_hardware(plan.cluster.gpu).peak(plan.param_dtype))


def resume(trainer: Trainer, request: Request) -> None:
    """Go on as `--resume` says: from the run's own checkpoints once it has any, so that the same command line can be
    started again, otherwise from those of another run. Raises InputError for `never` where there are some."""
    own, folder = trainer.checkpointer, request.checkpoints
    last = None if own is None else own.latest()
    if own is not None and last is not None:
        if request.resume == "never":
            raise InputError(
                f"--resume never, but {request.out} has a checkpoint of step {last}: give another --out, or remove it"
            )
        _resume_from(trainer, own)
    elif request.resume not in ("auto", "never"):
        _resume_from(trainer, _checkpoints_of(Path(request.resume)))
    elif own is not None and folder is not None and any(folder.glob("step-*")):
        _resume_from(trainer, own)  # damaged ones only, which are refused: not to be trained over in silence


def _checkpoints_of(folder: Path) -> Checkpointer:
    """Of a run's folder, or of the folder of its checkpoints."""
    inner = folder / "checkpoints"
    return Checkpointer(inner if inner.is_dir() else folder)


def _resume_from(trainer: Trainer, checkpointer: Checkpoints) -> None:
    step = trainer.resume(checkpointer)
    trainer.report.event("resumed", f"going on after step {step}", step=step)


def _tell_start(report: Report, model: Model, module: nn.Module, plan: Plan, data: Data) -> None:
    total = sum(parameter.numel() for parameter in model.module.parameters())
    trained = sum(parameter.numel() for parameter in model.module.parameters() if parameter.requires_grad)
    what = "" if trained == total else f", {count_text(trained)} of them trained"
    budget = data.budget
    kinds = [f"{budget.tokens:,} tokens"] + [f"{budget.patches:,} patches"] * bool(budget.patches)
    rows = " and ".join(kinds + [f"{item.count} {item.word}" for item in budget.items])
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    started = "1 process" if processes == 1 else f"{processes} processes"
    text = (
        f"{model.source.name}: {count_text(total)} parameters{what}; {plural(len(data.source), 'sample')}; {started}, "
        f"{plural(plan.accumulation, 'micro-step')} of {rows} on each of {plan.mesh.data_ranks} data ranks"
    )
    report.event("start", text, parameters=total, trained=trained, samples=len(data.source), processes=processes)
