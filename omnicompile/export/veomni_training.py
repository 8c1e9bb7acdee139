"""VeOmni's words for training options: `train.optimizer` holds the schedule too, its parts as shares of the steps."""

from __future__ import annotations

from omnicompile.export.choices import Choice
from omnicompile.export.report import Keys, Said, approximated, mapped, refused
from omnicompile.export.rules import key, never
from omnicompile.export.training import (
    NO_CLIPPING,
    given,
    optimizer_of,
    schedule_of,
    share_of,
    steps_of,
    train_rules,
)
from omnicompile.plan import Plan
from omnicompile.train.options import OptimizerKind, ScheduleKind

OPTIMIZER = "train.optimizer"
BETAS, EPS = (0.9, 0.95), 1e-8
"""Of its AdamW; no setting changes them."""


def _name(plan: Plan, choice: Choice) -> Said:
    written = {f"{OPTIMIZER}.type": str(choice.value)}
    if choice.value is OptimizerKind.ADAMW:
        return mapped(written)
    return approximated("its Muon takes stacked expert weights too, and leaves other matrices to AdamW", written)


def _rate(plan: Plan, choice: Choice) -> Said:
    """Its trainer of vision models has a learning rate of its own for the tower."""
    tower = {"train.vit_lr": choice.value} if "vision" in plan.blocks else {}
    return mapped({f"{OPTIMIZER}.lr": choice.value, **tower})


def _weight_decay(plan: Plan, choice: Choice) -> Said:
    muon = optimizer_of(choice).name is OptimizerKind.MUON
    written = {f"{OPTIMIZER}.weight_decay": choice.value} | (
        {f"{OPTIMIZER}.muon_weight_decay": choice.value} if muon else {}
    )
    if not choice.value:
        return mapped(written)
    why = "norms decay too, unless their classes are named in train.optimizer.no_decay_modules"
    return approximated(why, written | {f"{OPTIMIZER}.no_decay_params": ["bias"]})


def _steps(plan: Plan, choice: Choice) -> Said:
    if given(choice).epochs is not None:
        return refused("its max_steps counts within each epoch")
    why = "training ends with the first epoch of the data, if that has fewer steps"
    return approximated(why, {"train.max_steps": choice.value, "train.num_train_epochs": 1})


def _kind(plan: Plan, choice: Choice) -> Said:
    written: Keys = {f"{OPTIMIZER}.lr_decay_style": str(choice.value)}
    if choice.value is ScheduleKind.WSD:
        return refused("its schedules are constant, linear and cosine")
    if choice.value is ScheduleKind.LINEAR:
        return approximated("down to nothing one step after the last", written)
    if choice.value is ScheduleKind.COSINE:  # at its end with the last step, not one after it
        written[f"{OPTIMIZER}.lr_decay_ratio"] = share_of(steps_of(choice) - 1, steps_of(choice))
    return mapped(written)


def _warmup(plan: Plan, choice: Choice) -> Said:
    if not choice.value:
        return mapped()
    steps = given(choice).steps
    if steps is None:
        return refused("its warm-up is a share of the steps, and training has none given")
    start = optimizer_of(choice).lr / (choice.value + 1)  # of the first step
    return mapped({f"{OPTIMIZER}.lr_warmup_ratio": share_of(choice.value, steps), f"{OPTIMIZER}.lr_start": start})


def _final(plan: Plan, choice: Choice) -> Said:
    kind = schedule_of(choice).kind
    if kind is ScheduleKind.COSINE:
        return mapped({f"{OPTIMIZER}.lr_min": optimizer_of(choice).lr * choice.value})
    if kind is ScheduleKind.LINEAR and not choice.value:
        return mapped(why="down to nothing")
    return refused("only its cosine schedule has a least learning rate")


def _same(choice: Choice, value: object) -> Said:
    return mapped() if choice.value == value else refused(f"its AdamW always has {value}")


RULES = train_rules(
    {
        "steps": _steps,
        "epochs": lambda plan, choice: mapped({"train.num_train_epochs": choice.value or 1}),
        "optimizer.name": _name,
        "optimizer.lr": _rate,
        "optimizer.betas": lambda plan, choice: _same(choice, BETAS),
        "optimizer.eps": lambda plan, choice: _same(choice, EPS),
        "optimizer.weight_decay": _weight_decay,
        "optimizer.momentum": key(f"{OPTIMIZER}.muon_momentum"),
        "optimizer.adamw": never("it finds out itself what Muon leaves to AdamW"),
        "schedule.kind": _kind,
        "schedule.warmup": _warmup,
        "schedule.final": _final,
        "schedule.decay": never("it has no such schedule"),
        "clip": key(f"{OPTIMIZER}.max_grad_norm", lambda value: NO_CLIPPING if value is None else value),
        "seed": key("train.seed"),
        "freeze": never("it freezes vision and audio towers only: train.freeze_vit, train.freeze_audio_tower"),
        "checkpoint_every": key("train.checkpoint.save_steps"),
        "evaluation.data": never("give data.eval_path in its own format"),
        "evaluation.every": key("train.eval_steps"),
    }
)
