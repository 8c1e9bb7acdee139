"""The loss on another data set."""

from __future__ import annotations

import time
from itertools import islice

import torch

from omnicompile.train.everyone import Everyone
from omnicompile.train.guard import TrainingError
from omnicompile.train.losses import joined, named_losses
from omnicompile.train.protocols import Loader
from omnicompile.train.records import EvaluationRecord
from omnicompile.train.step import Module, count_targets


def evaluate(module: Module, loader: Loader, steps: int | None = None, at: int = 0) -> EvaluationRecord:
    """The mean loss per target token over one pass of `loader`, or its first `steps` steps, without dropout.

    at: the training step that it belongs to. All ranks call it together. Raises TrainingError if `loader` is empty.
    """
    start, training = time.perf_counter(), module.training
    total, weight, tokens = 0.0, 0, 0
    others: list[dict[str, float]] = []
    module.eval()
    try:
        with torch.no_grad():
            for step in islice(Everyone.of(module).guarded(loader, "reading the data"), steps):
                targets, parts = count_targets(module, step.micro_batches), []
                tokens += step.real_tokens
                if targets == 0:
                    continue
                for number, batch in enumerate(step.micro_batches):
                    last = number == len(step.micro_batches) - 1
                    with module.accumulate(last=last, targets=targets):
                        output = module(**batch)
                    share = output.loss.item() / (1 if targets else len(step.micro_batches))
                    total += share * (targets or 1)
                    parts.append(named_losses(output))
                others.append(joined(parts, shares=bool(targets)))
                weight += targets or 1
    finally:
        module.train(training)
    if not weight:
        raise TrainingError("the data to evaluate on has no sample")
    return EvaluationRecord(at, total / weight, tokens, time.perf_counter() - start, _means(others))


def _means(steps: list[dict[str, float]]) -> dict[str, float]:
    names = [name for name in steps[0] if all(name in step for step in steps)]
    return {name: sum(step[name] for step in steps) / len(steps) for name in names}
