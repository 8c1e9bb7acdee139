"""Training under a plan: optimizer, learning-rate schedule, one step, and the loop with checkpoints and evaluation.

    optimizer = make_optimizer(module, OptimizerOptions(lr=3e-4))
    schedule = make_schedule(optimizer, ScheduleOptions(ScheduleKind.COSINE, warmup=100), steps=10_000)
    for step in loader:
        result = train_step(module, optimizer, step.micro_batches, clip=1.0)
        schedule.step()

`omnicompile train` is made of the same pieces. Importing this package does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from omnicompile.train.options import (
    EvaluationOptions,
    OptimizerKind,
    OptimizerOptions,
    ScheduleKind,
    ScheduleOptions,
    TrainOptions,
)

if TYPE_CHECKING:
    from omnicompile.train.evaluation import evaluate
    from omnicompile.train.freezing import freeze
    from omnicompile.train.optimizer import make_optimizer
    from omnicompile.train.schedule import make_schedule
    from omnicompile.train.step import StepResult, train_step
    from omnicompile.train.trainer import Trainer

__all__ = [
    "EvaluationOptions",
    "OptimizerKind",
    "OptimizerOptions",
    "ScheduleKind",
    "ScheduleOptions",
    "StepResult",
    "TrainOptions",
    "Trainer",
    "evaluate",
    "freeze",
    "make_optimizer",
    "make_schedule",
    "train_step",
]

_LAZY: Mapping[str, str] = {
    "StepResult": "omnicompile.train.step",
    "Trainer": "omnicompile.train.trainer",
    "evaluate": "omnicompile.train.evaluation",
    "freeze": "omnicompile.train.freezing",
    "make_optimizer": "omnicompile.train.optimizer",
    "make_schedule": "omnicompile.train.schedule",
    "train_step": "omnicompile.train.step",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'omnicompile.train' has no attribute {name!r}")
    from importlib import import_module

    return vars(import_module(_LAZY[name]))[name]
