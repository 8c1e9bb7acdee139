"""Progress on a terminal, as plain lines, as JSON lines, in TensorBoard and in Weights & Biases."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from omnicompile.errors import InputError
from omnicompile.report.units import bytes_text
from omnicompile.train.records import EvaluationRecord, Sink, StepRecord, evaluation_scalars, scalars


def step_text(record: StepRecord) -> str:
    """One line: `step 12/50  loss 4.8755  lr 3.00e-03  ...`."""
    total = "" if record.steps is None else f"/{record.steps}"
    mfu = "-" if record.mfu is None else f"{record.mfu:.1%}"
    parts = [
        f"step {record.step}{total}", f"loss {record.loss:.5f}",
        *(f"{name} {value:.4f}" for name, value in record.losses.items()),
        f"lr {record.lr:.2e}", f"norm {record.grad_norm:.3f}", f"{record.tokens_per_second:,.0f} tokens/s/GPU",
        f"MFU {mfu}", bytes_text(record.memory), f"fill {fill_text(record.fill)}", f"epoch {record.epoch}",
    ]  # fmt: skip
    return "  ".join([*parts, f"{record.skipped} skipped"] if record.skipped else parts)


def fill_text(fill: Mapping[str, float]) -> str:
    """98.2% of tokens, 97.5% of patches; in short where there are tokens alone."""
    if set(fill) == {"tokens"}:
        return f"{fill['tokens']:.1%}"
    return ", ".join(f"{share:.1%} of {kind}" for kind, share in fill.items())


def evaluation_text(record: EvaluationRecord) -> str:
    named = "".join(f"  {name} {value:.4f}" for name, value in record.losses.items())
    return f"evaluation at step {record.step}  loss {record.loss:.5f}{named}  {record.tokens:,} tokens"


class Lines(Sink):
    """Plain lines, each written at once."""

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = file or sys.stdout

    def step(self, record: StepRecord) -> None:
        self._write(step_text(record))

    def evaluation(self, record: EvaluationRecord) -> None:
        self._write(evaluation_text(record))

    def event(self, name: str, text: str, values: Mapping[str, Any]) -> None:
        self._write(text)

    def close(self) -> None:
        self._file.flush()

    def _write(self, line: str) -> None:
        print(line, file=self._file, flush=True)


class Terminal(Sink):
    """Lines above a bar that shows the time left."""

    def __init__(self, steps: int | None) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, transient=True)
        self._task = self._progress.add_task("training", total=steps)
        self._progress.start()

    def step(self, record: StepRecord) -> None:
        self._progress.update(self._task, completed=record.step)
        self._write(step_text(record))

    def evaluation(self, record: EvaluationRecord) -> None:
        self._write(evaluation_text(record))

    def event(self, name: str, text: str, values: Mapping[str, Any]) -> None:
        self._write(text)

    def close(self) -> None:
        self._progress.stop()

    def _write(self, line: str) -> None:
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)


class JsonLines(Sink):
    """One JSON object a line: `{"event": "step", ...}`. A number that is not finite is null."""

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = file or sys.stdout

    def step(self, record: StepRecord) -> None:
        self._write({"event": "step", **asdict(record)})

    def evaluation(self, record: EvaluationRecord) -> None:
        self._write({"event": "evaluation", **asdict(record)})

    def event(self, name: str, text: str, values: Mapping[str, Any]) -> None:
        self._write({"event": name, "text": text, **values})

    def close(self) -> None:
        self._file.flush()

    def _write(self, values: Mapping[str, Any]) -> None:
        print(json.dumps({key: _finite(value) for key, value in values.items()}), file=self._file, flush=True)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TensorBoard(Sink):
    """Event files in `folder`, for `tensorboard --logdir`."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
        self._writer = SummaryWriter(str(folder))

    def step(self, record: StepRecord) -> None:
        self._add(scalars(record), record.step)

    def evaluation(self, record: EvaluationRecord) -> None:
        self._add(evaluation_scalars(record), record.step)

    def event(self, name: str, text: str, values: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        self._writer.close()

    def _add(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()


class WandB(Sink):
    """A run of Weights & Biases. project: where it goes. options: shown with the run."""

    def __init__(self, project: str, folder: Path, options: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise InputError("--wandb needs the package wandb: pip install wandb, and wandb login") from error
        try:
            self._run = wandb.init(project=project, dir=str(folder), config=dict(options))
        except Exception as error:
            raise InputError(f"--wandb: cannot start a run: {error}; wandb login, or WANDB_MODE=offline") from error

    def step(self, record: StepRecord) -> None:
        self._run.log(scalars(record), step=record.step)

    def evaluation(self, record: EvaluationRecord) -> None:
        self._run.log(evaluation_scalars(record), step=record.step)

    def event(self, name: str, text: str, values: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        self._run.finish()
