"""One optimizer step, for the trainer and for one's own loop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from omnicompile.errors import InputError
from omnicompile.runtime.parallel_module import ParallelModule
from omnicompile.runtime.plain_module import PlainModule
from omnicompile.runtime.targets import SeveralLosses, TargetCount
from omnicompile.train.losses import joined, named_losses

Module = ParallelModule | PlainModule
LABELS = "labels"


@dataclass(frozen=True)
class StepResult:
    """loss: of the global batch, over all micro-steps. grad_norm: before clipping. taken: the optimizer has stepped;
    otherwise loss or norm were not finite and no weight has changed. targets: of the step over all ranks, 0 where the
    model's loss has none that can be counted. micro_losses: each micro-step's share of the loss. losses: those that
    the model gives besides, by name."""

    loss: float
    grad_norm: float
    taken: bool
    targets: int
    micro_losses: tuple[float, ...]
    losses: Mapping[str, float] = field(default_factory=dict)


def train_step(
    module: Module, optimizer: Optimizer, micro_batches: Sequence[Mapping[str, Any]], clip: float | None = 1.0
) -> StepResult:
    """Forward, backward, clipping and optimizer step over this rank's micro-batches.

    The gradient is that of one process on all micro-batches of all ranks joined, the loss a mean over their target
    tokens (over the micro-batches, for a model whose loss counts none). clip: the largest gradient norm; None: not
    clipped. Nothing changes if the loss or the norm is not finite, or if no rank has a target. Every rank calls it with
    as many micro-batches.
    """
    if not micro_batches:
        raise InputError("a step needs at least one micro-batch")
    targets = count_targets(module, micro_batches)
    if targets == 0:
        return StepResult(0.0, 0.0, True, 0, (0.0,) * len(micro_batches))
    last = len(micro_batches) - 1
    parts, others = [], []
    for number, batch in enumerate(micro_batches):
        with module.accumulate(last=number == last, targets=targets):
            output = module(**batch)
            loss = output.loss if targets else output.loss / len(micro_batches)
            loss.backward()
        parts.append(loss.detach())
        others.append(named_losses(output))
    norm = module.clip_grad_norm_(math.inf if clip is None else clip)
    *micro, grad_norm = torch.stack([*parts, norm.to(parts[0].device, parts[0].dtype)]).tolist()
    taken = all(map(math.isfinite, (*micro, grad_norm)))
    if taken:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    found = joined(others, shares=bool(targets))
    return StepResult(math.fsum(micro), grad_norm, taken, targets or 0, tuple(micro), found)


def device_of(module: Module) -> torch.device:
    """Where the module computes. Its parameters may be elsewhere: in host memory where the optimizer is offloaded."""
    if isinstance(module, ParallelModule):
        return module.engine.mesh.device
    return next(module.parameters()).device


def count_targets(module: Module, batches: Sequence[Mapping[str, Any]]) -> TargetCount | None:
    """Targets of micro-batches over all ranks; None for a model whose loss has none that can be counted."""
    plain = isinstance(module, PlainModule) and not isinstance(module.plain_model, SeveralLosses)
    if plain and any(batch.get(LABELS) is None for batch in batches):
        return None
    found = module.count_targets(batches)
    return found if found.by_loss else None
