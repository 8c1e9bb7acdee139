"""A training run as `omnicompile train` asks for it: built from a recipe, data and options, run, reported."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnicompile.errors import InputError
from omnicompile.plan import Plan
from omnicompile.train.options import TrainOptions
from omnicompile.train.settings import load_options

if TYPE_CHECKING:
    from omnicompile.train.records import Report, Sink


@dataclass(frozen=True)
class Request:
    """The command line of `omnicompile train`, see its help. resume: auto, never or a folder."""

    recipe: Path
    data: str
    out: Path | None = None
    model: str | None = None
    config: str | None = None
    weights: str | None = None
    processor: str | None = None
    resume: str = "auto"
    train: str | None = None
    sets: tuple[str, ...] = ()
    json: bool = False
    tensorboard: bool = False
    wandb: str | None = None
    profile: int | None = None
    export: str | None = None
    device: str | None = None
    backend: str | None = None
    kernels: str | None = None
    dry_run: bool = False

    def options(self) -> TrainOptions:
        return load_options(self.recipe, self.train, self.sets)

    def model_spec(self, plan: Plan) -> str:
        """The model as the recipe names it, beside the recipe if it is not where the command runs."""
        if self.model is not None:
            return self.model
        path, colon, function = plan.model.partition(".py:")
        name = Path(f"{path}.py" if colon else plan.model)
        beside = self.recipe.parent / name
        if name.suffix and not name.exists() and beside.exists():
            return f"{beside}:{function}" if colon else str(beside)
        return plan.model

    @property
    def checkpoints(self) -> Path | None:
        return None if self.out is None else self.out / "checkpoints"


def check_request(request: Request, plan: Plan) -> TrainOptions:
    """What can be told before any process is started. Raises InputError, RecipeError or PlanError."""
    from omnicompile.cost_model.hardware import load_hardware
    from omnicompile.kernels.choice import parse_kernels
    from omnicompile.support import refuse_unexecutable

    refuse_unexecutable(plan)
    load_hardware(plan.cluster.gpu)
    options = request.options()
    if request.out is None and not request.dry_run:
        raise InputError("--out is needed: the folder for checkpoints and logs")
    if request.out is not None and request.out.exists() and not request.out.is_dir():
        raise InputError(f"--out {request.out} is a file: give a folder")
    _check_data("--data", request.data)
    if options.evaluation.data is not None:
        _check_data("evaluation.data", options.evaluation.data)
    for option, folder in (("--weights", request.weights), ("--processor", request.processor)):
        if folder is not None and not Path(folder).is_dir():
            raise InputError(f"{option} {folder} is not a folder (names on a hub are not downloaded)")
    if request.resume not in ("auto", "never") and not Path(request.resume).is_dir():
        raise InputError(f"--resume {request.resume}: give auto, never, or the folder of a run")
    parse_kernels(request.kernels)
    if request.profile is not None and request.profile < 1:
        raise InputError(f"--profile must be at least 1, got {request.profile}")
    for wanted, package in ((request.tensorboard, "tensorboard"), (request.wandb is not None, "wandb")):
        if wanted and find_spec(package) is None:
            raise InputError(f"--{package} needs the package {package}: pip install {package}")
    return options


def _check_data(option: str, data: str) -> None:
    if not any(mark in data for mark in "*{") and not Path(data).exists():
        raise InputError(f"{option} {data} does not exist")


def train(request: Request) -> int:
    """Train on this process and those started with it. Returns the exit code."""
    from omnicompile.runtime.mesh import start_processes

    plan = _plan(request)
    options = check_request(request, plan)
    start_processes(request.device)
    _require_world(plan)
    from omnicompile.train.stop import StopRequest

    stop, report = StopRequest(), make_report(request, options)
    try:
        from omnicompile.train.assembly import assemble

        run = assemble(request, plan, options, stop, report)
        with stop.listening():  # before there is anything to save a signal ends the process as it would any other
            finished = run.trainer.run()
            if request.export is not None and not finished.stopped:
                run.export(request.export)
            _say_end(report, finished.step, finished.stopped, run.loader.skipped)
    finally:
        report.close()
    _leave()
    return 128 + finished.stopped if finished.stopped else 0


def _plan(request: Request) -> Plan:
    from omnicompile.recipe import load_recipe

    plan, options = load_recipe(request.recipe), request.options()
    return plan if options.accumulation is None else replace(plan, accumulation=options.accumulation)


def _require_world(plan: Plan) -> None:
    import torch.distributed as dist

    from omnicompile.errors import PlanError

    world = dist.get_world_size() if dist.is_initialized() else 1
    if world != plan.mesh.world:
        raise PlanError(
            f"the recipe is for {plan.mesh.world} processes, and there are {world}: start as many as it is for, or "
            f"plan again with `omnicompile plan {plan.model} --gpus {world}`"
        )


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _say_end(report: Report, step: int, stopped: int, skipped: dict[str, int]) -> None:
    import signal

    left = ", ".join(f"{count} {cause.replace('_', '-')}" for cause, count in skipped.items() if count)
    samples = f"; samples left out: {left}" if left else ""
    if stopped:
        name = signal.Signals(stopped).name
        text = f"{name}: stopped after step {step}, with a checkpoint{samples}"
        report.event("stopped", text, step=step, signal=name, left_out=skipped)
    else:
        report.event("end", f"training has ended with step {step}{samples}", step=step, left_out=skipped)


def make_report(request: Request, options: TrainOptions) -> Report:
    """Where progress goes: rank 0's only."""
    import os

    from omnicompile.schema import encode
    from omnicompile.train.records import Report
    from omnicompile.train.sinks import JsonLines, Lines, TensorBoard, Terminal, WandB

    if int(os.environ.get("RANK", "0")):
        return Report([])
    assert request.out is not None
    try:
        request.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {request.out} cannot be made: {error.strerror}") from error
    lines = Terminal(options.steps) if sys.stdout.isatty() else Lines()
    sinks: list[Sink] = [JsonLines() if request.json else lines]
    if request.tensorboard:
        sinks.append(TensorBoard(request.out / "tensorboard"))
    if request.wandb is not None:
        sinks.append(WandB(request.wandb, request.out, encode(options)))
    return Report(sinks)


def processor_of(request: Request, spec: str) -> Callable[[], Any]:
    """Makes the processor or tokenizer: of --processor, of processor() in the model's file, or of --weights."""

    def make() -> Any:
        from omnicompile.capture.source import load_model_source

        file, _, _ = spec.partition(".py")
        if request.processor is None and spec != file and "def processor(" in Path(f"{file}.py").read_text("utf-8"):
            return load_model_source(f"{file}.py:processor").build()
        folder = request.processor or request.weights
        if folder is None:
            raise InputError(
                "the data needs a processor or tokenizer: give --processor FOLDER (as save_pretrained writes it), or "
                f"define processor() in {spec if spec != file else 'a model file'}"
            )
        return _pretrained(folder)

    return make


def _pretrained(folder: str) -> Any:
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{folder} holds no processor or tokenizer that can be read: {first}") from error
