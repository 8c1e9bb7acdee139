"""The loop over a plain model in this process: ends, progress, guard, evaluation, checkpoints."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from in_memory import Kept, MemoryLoader, MemoryStep, text_loader
from tiny_models import dense_model, text_batch
from torch import nn

import omnicompile
from omnicompile.checkpoint.checkpointer import Checkpointer
from omnicompile.runtime.parallel_module import ParallelModule
from omnicompile.runtime.plain_module import PlainModule
from omnicompile.train import EvaluationOptions, OptimizerOptions, ScheduleKind, ScheduleOptions, Trainer, TrainOptions
from omnicompile.train.evaluation import evaluate
from omnicompile.train.guard import TrainingError
from omnicompile.train.records import Report
from omnicompile.train.sample_log import SampleLog
from omnicompile.train.step import device_of, train_step

FAST = OptimizerOptions(lr=5e-3)


def plain(model: nn.Module | None = None) -> PlainModule:
    module = omnicompile.parallelize(model or dense_model(layers=1), None, "cpu")
    assert isinstance(module, PlainModule)
    return module


def trainer(options: TrainOptions, loader: Any = None, **more: Any) -> tuple[Trainer, Kept]:
    from omnicompile.train import make_optimizer

    kept = Kept()
    module = more.pop("module", None) or plain()
    optimizer = make_optimizer(module, options.optimizer)
    loader = text_loader(8, 2) if loader is None else loader
    return Trainer(module, optimizer, loader, options, report=Report([kept]), **more), kept


def test_training_runs_over_epochs_until_its_last_step_and_learns() -> None:
    run, kept = trainer(TrainOptions(steps=20, optimizer=FAST))
    assert run.run().step == 20
    assert [r.step for r in kept.steps] == list(range(1, 21))
    assert [r.epoch for r in kept.steps] == [n // 4 for n in range(20)]
    assert kept.losses[-1] < kept.losses[0] - 0.5
    assert all(r.tokens == 32 and r.tokens_per_second > 0 and r.mfu is None for r in kept.steps)


@pytest.mark.parametrize(("steps", "epochs", "want"), [(None, None, 4), (None, 3, 12), (6, 3, 6), (20, 2, 8)])
def test_the_end_is_what_comes_first(steps: int | None, epochs: int | None, want: int) -> None:
    run, kept = trainer(TrainOptions(steps=steps, epochs=epochs))
    assert run.run().step == want == len(kept.steps)


def test_progress_is_told_every_so_many_steps_with_the_tokens_between() -> None:
    run, kept = trainer(TrainOptions(steps=8, log_every=3))
    run.run()
    assert [(r.step, r.tokens) for r in kept.steps] == [(3, 96), (6, 96), (8, 64)]


def test_the_schedule_is_what_the_optimizer_sees() -> None:
    schedule = ScheduleOptions(ScheduleKind.LINEAR, warmup=2)
    run, kept = trainer(TrainOptions(steps=6, optimizer=FAST, schedule=schedule))
    run.run()
    assert [r.lr / 5e-3 for r in kept.steps] == pytest.approx([1 / 3, 2 / 3, 1, 2 / 3, 1 / 3, 0])


def test_a_signal_ends_training_after_the_step_with_a_checkpoint(tmp_path: Path) -> None:
    class Signalling(MemoryLoader):
        def __iter__(self) -> Iterator[MemoryStep]:
            for step in super().__iter__():
                if step.step == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield step

    run, _ = trainer(
        TrainOptions(steps=50),
        Signalling([text_batch(s, 16) for s in range(8)], 2),
        checkpointer=Checkpointer(tmp_path),
    )
    before = signal.getsignal(signal.SIGTERM)
    with run.stop.listening():
        finished = run.run()
    assert finished.step == 3 and finished.stopped == signal.SIGTERM
    assert Checkpointer(tmp_path).latest() == 3
    assert signal.getsignal(signal.SIGTERM) is before


class Spiked(nn.Module):
    """A language model whose loss is not a number for batches that begin with token 1."""

    def __init__(self) -> None:
        super().__init__()
        self.model = dense_model(layers=1)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        output = self.model(input_ids=input_ids, labels=labels)
        output.loss = output.loss * (float("nan") if int(input_ids[0, 0]) == 1 else 1.0)
        return output


def spiked_loader(bad: tuple[int, ...]) -> MemoryLoader:
    loader = text_loader(8, 2)
    for number, batch in enumerate(loader.batches):
        batch["input_ids"][0, 0] = 1 if number in bad else 2  # type: ignore[index]
    return loader


def test_a_loss_that_is_not_finite_ends_training_and_names_step_and_samples() -> None:
    run, kept = trainer(TrainOptions(steps=8), spiked_loader((5,)), module=plain(Spiked()))
    before: dict[str, torch.Tensor] = {}

    class Watching(Kept):
        def step(self, record: Any) -> None:
            before.update({name: value.clone() for name, value in run.module.named_parameters()})

    run.report = Report([kept, Watching()])
    with pytest.raises(
        TrainingError, match=r"step 3: the loss is nan in micro-step 1, in samples \(0, 4, 0\), \(0, 5, 0\)"
    ):
        run.run()
    assert len(kept.steps) == 2
    for name, value in run.module.named_parameters():
        assert torch.equal(value, before[name]), "a step that was not finite has changed a weight"
    assert not any(p.grad is not None for p in run.module.parameters())


def test_some_steps_may_be_left_out_but_no_more_than_allowed() -> None:
    run, kept = trainer(TrainOptions(steps=4, skip_nonfinite=1), spiked_loader((2,)), module=plain(Spiked()))
    run.run()
    assert [r.skipped for r in kept.steps] == [0, 1, 1, 1]
    assert math.isnan(kept.losses[1]) and all(math.isfinite(loss) for loss in kept.losses[2:])
    assert ("skipped", "step 2 left out: the loss is nan in micro-step 0") in kept.events
    run, _ = trainer(TrainOptions(steps=4, skip_nonfinite=1), spiked_loader((2, 4)), module=plain(Spiked()))
    with pytest.raises(TrainingError, match=r"step 3: .*1 were left out before"):
        run.run()


def test_evaluation_is_the_mean_over_targets_and_leaves_training_as_it_is() -> None:
    module, loader = plain(), text_loader(6, 2)
    record = evaluate(module, loader, at=7)
    total = sum(float(module(**b).loss.detach()) * int((b["labels"][:, 1:] != -100).sum()) for b in loader.batches)
    count = sum(int((b["labels"][:, 1:] != -100).sum()) for b in loader.batches)
    assert record.loss == pytest.approx(total / count, abs=1e-5)
    assert (record.step, record.tokens) == (7, 96)
    options = TrainOptions(steps=8, evaluation=EvaluationOptions(every=3, steps=2), optimizer=FAST)
    with_it, told = trainer(options, evaluation=text_loader(6, 2))
    with_it.run()
    without, alone = trainer(options)
    without.run()
    assert [r.step for r in told.evaluations] == [3, 6, 8]
    assert told.losses == alone.losses


class Dying(MemoryLoader):
    """Fails after its seventh step."""

    def __iter__(self) -> Iterator[MemoryStep]:
        for step in super().__iter__():
            if step.step == 7:
                raise ConnectionError("the disk is gone")
            yield step


def test_a_run_that_was_cut_off_goes_on_as_one_that_never_was(tmp_path: Path) -> None:
    schedule = ScheduleOptions(ScheduleKind.COSINE, warmup=2)
    options = TrainOptions(steps=12, optimizer=FAST, schedule=schedule, checkpoint_every=5)
    whole, want = trainer(options)
    whole.run()
    folder, log = tmp_path / "run", tmp_path / "samples.jsonl"
    batches = [text_batch(seed, 16) for seed in range(8)]
    first, _ = trainer(options, Dying(batches, 2), checkpointer=Checkpointer(folder), sample_log=SampleLog(log))
    with pytest.raises(ConnectionError):
        first.run()
    assert first.checkpointer is not None
    first.checkpointer.wait()
    second, kept = trainer(options, checkpointer=Checkpointer(folder), sample_log=SampleLog(log))
    assert second.resume(Checkpointer(folder)) == 5
    second.run()
    assert kept.losses == pytest.approx(want.losses[5:], abs=1e-7)
    assert [r.lr for r in kept.steps] == pytest.approx([r.lr for r in want.steps[5:]])
    seen = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in seen] == list(range(1, 13))
    assert [sample for line in seen for sample in line["samples"]] == [[n // 8, n % 8, 0] for n in range(24)]
    assert Checkpointer(folder).latest() == 12


def test_a_run_that_begins_again_begins_its_log_again(tmp_path: Path) -> None:
    log = SampleLog(tmp_path / "samples.jsonl")
    for _ in range(2):
        trainer(TrainOptions(steps=3), sample_log=log)[0].run()
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"step": 4, "sam')
    log.keep(3)
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_data_without_a_sample_is_an_error() -> None:
    run, _ = trainer(TrainOptions(steps=3), MemoryLoader([], 1))
    with pytest.raises(TrainingError, match="no sample"):
        run.run()


def test_a_step_is_profiled(tmp_path: Path) -> None:
    run, kept = trainer(TrainOptions(steps=3), profile=(2, tmp_path))
    run.run()
    (path,) = tmp_path.iterdir()
    assert path.name == "step-2.json" and "traceEvents" in json.loads(path.read_text())
    assert ("profile", f"step 2 profiled: {path}") in kept.events


def test_losses_that_a_model_names_are_told() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = dense_model(layers=1)

        def forward(self, **batch: Any) -> Mapping[str, Any]:
            output = self.model(**batch)
            output["losses"] = {"text": output.loss, "image": output.loss * 2}
            return output

    options = TrainOptions(steps=2, evaluation=EvaluationOptions(every=2))
    run, kept = trainer(options, text_loader(4, 1), module=plain(Two()), evaluation=text_loader(2, 1))
    run.run()
    assert set(kept.evaluations[0].losses) == {"text", "image"}
    for record in kept.steps:
        assert record.losses == pytest.approx({"text": record.loss, "image": 2 * record.loss}, rel=1e-5)


def test_a_step_without_targets_changes_nothing_and_is_no_failure() -> None:
    """Of a long prompt that was split, say."""
    empty = text_batch(0) | {"labels": torch.full((1, 32), -100)}
    loader = MemoryLoader([empty, empty, *(text_batch(seed) for seed in range(2))], 2)
    run, kept = trainer(TrainOptions(steps=2, optimizer=FAST), loader, evaluation=MemoryLoader([empty, empty], 2))
    before = [value.clone() for value in run.module.parameters()]
    result = train_step(run.module, run.optimizer, [empty, empty])
    assert (result.loss, result.grad_norm, result.taken, result.targets) == (0.0, 0.0, True, 0)
    assert all(map(torch.equal, before, run.module.parameters()))
    with pytest.raises(TrainingError, match="evaluate on has no sample"):
        run.run()
    assert [r.loss == 0 for r in kept.steps] == [True, False] and all(math.isfinite(r.loss) for r in kept.steps)


def test_memory_is_that_of_the_device_that_computes() -> None:
    """Parameters of an offloaded optimizer are in host memory, and the module computes elsewhere."""
    module = ParallelModule.__new__(ParallelModule)
    nn.Module.__init__(module)
    module.register_parameter("weight", nn.Parameter(torch.zeros(2)))
    module.engine = SimpleNamespace(mesh=SimpleNamespace(device=torch.device("cuda", 3)))  # type: ignore[assignment]
    assert device_of(module) == torch.device("cuda", 3)
    assert device_of(plain()) == torch.device("cpu")
