"""Other training loops over a ParallelModule: accelerate, and transformers' Trainer, as docs/training.md describes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import dense_model, make_plan, run_ranks, text_batch
from torch.utils.data import DataLoader, Dataset

import omnicompile
from omnicompile.plan import Mesh
from omnicompile.runtime.plain_module import PlainModule
from omnicompile.train import train_step

STEPS, RATE = 4, 1e-2
pytestmark = pytest.mark.slow


class Batches(Dataset[Any]):
    def __len__(self) -> int:
        return 2 * STEPS

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {name: value[0] for name, value in text_batch(number).items()}


def distributed() -> Any:
    plan = make_plan(("text",), Mesh(dp_shard=2))
    return omnicompile.parallelize(dense_model(), plan, "cpu", example_batch=text_batch(0), backend="eager")


def one_process(clip: float | None) -> list[float]:
    """Losses of the plain model on the batches of both ranks."""
    module = PlainModule(dense_model())
    optimizer = torch.optim.AdamW(module.parameters(), lr=RATE, weight_decay=0.0)
    batches = [text_batch(number) for number in range(2 * STEPS)]
    return [train_step(module, optimizer, batches[2 * n : 2 * n + 2], clip).loss for n in range(STEPS)]


def with_accelerate(rank: int, world: int) -> list[float]:
    """Optimizer and loader are prepared, the module is not."""
    from accelerate import Accelerator

    module, accelerator = distributed(), Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(module.parameters(), lr=RATE, weight_decay=0.0)
    optimizer, loader = accelerator.prepare(optimizer, DataLoader(Batches(), batch_size=1))
    losses = []
    for batch in loader:
        loss = module(**batch).loss
        accelerator.backward(loss)
        module.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def with_trainer(rank: int, world: int, folder: str) -> list[float]:
    """Trainer is left to believe that it is alone, so that it neither wraps the module nor cuts up its data."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    module = distributed()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        del os.environ[name]

    class Clip(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            module.clip_grad_norm_(1.0)

    class OwnShare(Trainer):
        def get_train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(Batches(), batch_size=1, sampler=range(rank, 2 * STEPS, world))

    arguments = TrainingArguments(
        folder, use_cpu=True, max_steps=STEPS, learning_rate=RATE, lr_scheduler_type="constant", weight_decay=0.0,
        max_grad_norm=0.0, logging_steps=1, save_strategy="no", report_to=[], remove_unused_columns=False,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = OwnShare(model=module, args=arguments, train_dataset=Batches(), callbacks=[Clip()])
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    assert trainer.model_wrapped is module
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_accelerate_drives_optimizer_and_loader() -> None:
    want = one_process(clip=1.0)
    for losses in run_ranks(with_accelerate, 2):
        assert losses == pytest.approx(want, abs=1e-5)


def test_the_trainer_of_transformers_drives_a_module_when_it_believes_to_be_alone(tmp_path: Path) -> None:
    want = one_process(clip=1.0)
    for losses in run_ranks(with_trainer, 2, str(tmp_path)):
        assert losses == pytest.approx(want, abs=1e-5)
