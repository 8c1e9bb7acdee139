"""The training loop: steps, progress, evaluation, checkpoints, and an end that leaves all ranks in step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from omnicompile.train.evaluation import evaluate
from omnicompile.train.everyone import Everyone
from omnicompile.train.guard import FiniteGuard, TrainingError, not_finite
from omnicompile.train.meter import Cost, Meter
from omnicompile.train.options import TrainOptions
from omnicompile.train.profile import profiled
from omnicompile.train.protocols import Checkpointer, Loader, Step
from omnicompile.train.records import Report, StepRecord
from omnicompile.train.sample_log import SampleLog
from omnicompile.train.schedule import make_schedule
from omnicompile.train.step import Module, StepResult, device_of, train_step
from omnicompile.train.stop import StopRequest


@dataclass(frozen=True)
class Finished:
    """step: steps of the whole training so far. stopped: the signal that ended it, 0 where it came to its end."""

    step: int
    stopped: int = 0


@dataclass
class Trainer:
    """Trains `module` on `loader` as `options` say.

    checkpointer: None keeps nothing. evaluation: another loader, started from its beginning each time. report: where
    progress goes (rank 0's). cost: for MFU. sample_log: where the samples of every step are written (rank 0's).
    profile: the step that is recorded as a Chrome trace, into the folder given with it. name_of: a sample by its key,
    for messages. done: steps taken before.
    """

    module: Module
    optimizer: Optimizer
    loader: Loader
    options: TrainOptions
    checkpointer: Checkpointer | None = None
    evaluation: Loader | None = None
    report: Report = field(default_factory=lambda: Report([]))
    cost: Cost | None = None
    sample_log: SampleLog | None = None
    profile: tuple[int, Path] | None = None
    name_of: Callable[[Sequence[int]], str] = str
    stop: StopRequest = field(default_factory=StopRequest)
    done: int = 0

    def __post_init__(self) -> None:
        self._everyone = Everyone.of(self.module)
        self._meter = Meter(self._everyone, device_of(self.module), self.cost)
        self._guard = FiniteGuard(self.options.skip_nonfinite)
        self._saved = self.done
        self._evaluated = -1
        self._start = None if self.evaluation is None else self.evaluation.state_dict()
        self._rates = [group["lr"] for group in self.optimizer.param_groups]

    def resume(self, checkpointer: Checkpointer, step: int | None = None) -> int:
        """Go on from the last checkpoint of `checkpointer`, or that of `step`. Returns the step. Learning rates stay
        those of the present options. All ranks call it together."""
        restored = checkpointer.load(self.module, self.optimizer, step)
        self.loader.load_state_dict(restored.extra["loader"])
        self._guard.skipped = int(restored.extra["skipped"])
        self.done = self._saved = restored.step
        for group, rate in zip(self.optimizer.param_groups, self._rates):
            group["lr"] = rate
        return self.done

    def run(self) -> Finished:
        """Train to the end, or until a signal that `stop` has taken, on whichever rank. All ranks call it together."""
        try:
            return self._run(self.options)
        except TrainingError:
            self._wait()  # a checkpoint that is being written is whole when the run ends
            raise

    def _run(self, options: TrainOptions) -> Finished:
        if options.steps is not None and self.done >= options.steps:
            return Finished(self.done)
        if self.sample_log is not None:
            self.sample_log.keep(self.done)
        schedule = make_schedule(self.optimizer, options.schedule, options.steps, self.done)
        for step, waited in self._steps():
            lr = float(self.optimizer.param_groups[0]["lr"])
            result = self._train(step, waited)
            schedule.step()
            self.done += 1
            self._tell(step, result, lr)
            stopped = int(self._everyone.largest([self.stop.number])[0])
            if stopped:
                self._save()
                self._wait()
                return Finished(self.done, stopped)
            if self.done == options.steps:
                break
            self._between()
        self._evaluate()
        self._save()
        self._wait()
        return Finished(self.done)

    def _steps(self) -> Iterator[tuple[Step, float]]:
        """Steps of all epochs that are left, each with the seconds that it was waited for."""
        last = self.options.epochs or (1 if self.options.steps is None else None)
        empty = 0
        while True:
            steps, began = 0, time.perf_counter()
            for step in self._everyone.guarded(self.loader, "reading the data"):
                if last is not None and step.epoch >= last:
                    return
                yield step, time.perf_counter() - began
                steps, epoch, began = steps + 1, step.epoch + 1, time.perf_counter()
            empty = 0 if steps else empty + 1
            if steps and last is not None and epoch >= last:
                return
            if empty > 1 and self.done:  # a run that goes on at the end of an epoch has one pass without a step
                return
            if empty > 1:
                raise TrainingError("the data has no sample to train on")

    def _train(self, step: Step, waited: float) -> StepResult:
        began = time.perf_counter()
        with profiled(self.profile, self.done + 1, self._everyone.rank) as trace:
            result = train_step(self.module, self.optimizer, step.micro_batches, self.options.clip)
        self._meter.add(step.real_tokens, waited + time.perf_counter() - began, step.micro_batches)
        if trace is not None:
            self.report.event("profile", f"step {self.done + 1} profiled: {trace}", step=self.done + 1, path=str(trace))
        if self.sample_log is not None:
            self.sample_log.write(self.done + 1, step.keys)
        if not self._guard.check(self.done + 1, result, [self.name_of(key) for key in step.keys]):
            text = f"step {self.done + 1} left out: {not_finite(result)}"
            self.report.event("skipped", text, step=self.done + 1)
        return result

    def _tell(self, step: Step, result: StepResult, lr: float) -> None:
        if self.done % self.options.log_every and self.done != self.options.steps:
            return
        speed = self._meter.read()
        self.report.step(
            StepRecord(
                step=self.done, steps=self.options.steps, epoch=step.epoch, loss=result.loss, lr=lr,
                grad_norm=result.grad_norm, tokens=speed.tokens, seconds=speed.seconds,
                tokens_per_second=speed.tokens_per_second, mfu=speed.mfu, memory=speed.memory, fill=step.fill,
                losses=result.losses, skipped=self._guard.skipped,
            )
        )  # fmt: skip

    def _between(self) -> None:
        every = self.options.checkpoint_every
        if self.done % self.options.evaluation.every == 0:
            self._evaluate()
        if every is not None and self.done % every == 0:
            self._save()

    def _evaluate(self) -> None:
        if self.evaluation is None or self._start is None or self._evaluated == self.done:
            return
        self.evaluation.load_state_dict(self._start)
        self._evaluated = self.done
        self.report.evaluation(evaluate(self.module, self.evaluation, self.options.evaluation.steps, self.done))

    def _save(self) -> None:
        if self.checkpointer is None or self._saved == self.done:
            return
        self.checkpointer.save(self.done, self.module, self.optimizer, self.extra())
        self._saved = self.done
        self.report.event("checkpoint", f"checkpoint of step {self.done}", step=self.done)

    def _wait(self) -> None:
        if self.checkpointer is not None:
            self.checkpointer.wait()

    def extra(self) -> Mapping[str, Any]:
        """What a checkpoint holds beside model, optimizer and random numbers; the same on every rank."""
        return {"loader": self.loader.state_dict(), "skipped": self._guard.skipped}
