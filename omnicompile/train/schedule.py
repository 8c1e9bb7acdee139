"""Learning rates over the steps."""

from __future__ import annotations

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from omnicompile.errors import InputError
from omnicompile.train.options import ScheduleKind, ScheduleOptions


def lr_factor(options: ScheduleOptions, steps: int | None, step: int) -> float:
    """The learning rate of step number `step` (from 0) as a share of the optimizer's, in a training of `steps` steps.

    Warm-up grows linearly and reaches 1 with the step after it; the last step has the share `final`.
    """
    if step < options.warmup:
        return (step + 1) / (options.warmup + 1)
    if options.kind is ScheduleKind.CONSTANT or steps is None:
        return 1.0
    down = steps - options.warmup
    if options.kind is ScheduleKind.WSD:
        down = options.decay or max(1, steps // 10)
    first = steps - down
    if step < first:
        return 1.0
    share = min(1.0, (step - first + 1) / down) if options.kind is ScheduleKind.WSD else _share(step - first, down)
    height = 0.5 * (1 + math.cos(math.pi * share)) if options.kind is ScheduleKind.COSINE else 1 - share
    return options.final + (1 - options.final) * height


def _share(done: int, down: int) -> float:
    """Of the way down: 0 at its first step, 1 at its last."""
    return min(1.0, done / max(1, down - 1))


def make_schedule(optimizer: Optimizer, options: ScheduleOptions, steps: int | None = None, done: int = 0) -> LambdaLR:
    """A torch scheduler: call `step()` after every optimizer step. steps: of the whole training. done: steps that have
    been taken already, of a training that goes on; the groups' `lr` is then the one before any schedule.

    Raises InputError if the schedule goes down and `steps` is None.
    """
    if steps is None and options.kind is not ScheduleKind.CONSTANT:
        raise InputError(f"schedule {options.kind} needs the number of steps")
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return LambdaLR(optimizer, partial(lr_factor, options, steps), last_epoch=done - 1)
