"""Options of `omnicompile train` as choices, and what several targets need to know of them.

A schedule is said in different words everywhere, and its fields hang together: rules get all options with each choice.
Of T steps with W of warm-up, step n, counted from 0, has (n + 1) / (W + 1) of the learning rate while n < W, and a
linear or cosine schedule comes to its end with step T - 1 (`omnicompile/train/schedule.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass

from omnicompile.export.choices import Choice
from omnicompile.export.report import Keys, Said, mapped
from omnicompile.export.rules import Rule
from omnicompile.plan import Plan
from omnicompile.train.options import OptimizerKind, OptimizerOptions, ScheduleKind, ScheduleOptions, TrainOptions

SECTION = "train"
NO_CLIPPING = 1e30
"""A bound that no norm of gradients reaches, for targets that always clip."""
_OF_MUON = ("optimizer.momentum", "optimizer.adamw")
_ALWAYS = ("steps", "epochs", "clip", "seed", "schedule.kind", "schedule.warmup", "schedule.final", "schedule.decay")


def train_choices(options: TrainOptions) -> list[Choice]:
    """What decides on the trained weights, and of the rest (evaluation, checkpoints, progress) what is not at its
    default.

    `accumulation` is not among them: it is `step.accumulation` of the plan that is exported.
    """
    default = TrainOptions()
    found = []
    for name in option_names():
        value = _value(options, name)
        if name == "accumulation" or not _is_used(options, name):
            continue
        if name in _ALWAYS or name.startswith("optimizer.") or value != _value(default, name):
            found.append(Choice(SECTION, name, value, options=options))
    return found


def option_names() -> list[str]:
    """Of all training options, those of sections with a dot: "steps", "optimizer.lr", ..."""
    names = []
    for field in fields(TrainOptions):
        value = getattr(TrainOptions(), field.name)
        inner = [f.name for f in fields(value)] if is_dataclass(value) else []
        names += [f"{field.name}.{name}" for name in inner] or [field.name]
    return names


def _value(options: TrainOptions, name: str) -> object:
    section, _, field = name.rpartition(".")
    return getattr(getattr(options, section) if section else options, field)


def _is_used(options: TrainOptions, name: str) -> bool:
    """Whether an option says anything beside the others."""
    kind = options.schedule.kind
    if name in _OF_MUON:
        return options.optimizer.name is OptimizerKind.MUON
    if name == "schedule.decay":
        return kind is ScheduleKind.WSD
    if name == "schedule.final":
        return kind is not ScheduleKind.CONSTANT
    if name in ("evaluation.every", "evaluation.steps"):
        return options.evaluation.data is not None
    if name == "steps":
        return options.steps is not None
    if name == "epochs":
        return options.epochs is not None or options.steps is None
    return True


def given(choice: Choice) -> TrainOptions:
    """All options of a choice of this section."""
    assert choice.options is not None
    return choice.options


def schedule_of(choice: Choice) -> ScheduleOptions:
    return given(choice).schedule


def optimizer_of(choice: Choice) -> OptimizerOptions:
    return given(choice).optimizer


def steps_of(choice: Choice) -> int:
    """Of the whole training. Only for schedules that go down, which have it."""
    steps = given(choice).steps
    assert steps is not None
    return steps


def decay_of(choice: Choice) -> int:
    """Steps of the way down of a wsd schedule."""
    return schedule_of(choice).decay or max(1, steps_of(choice) // 10)


def share_of(count: int, steps: int) -> float:
    """The least share s, with whose product int(steps * s) a target comes back to `count` steps."""
    share = count / steps
    return share if int(steps * share) == count else math.nextafter(share, math.inf)


def train_rules(rules: dict[str, Rule]) -> dict[str, Rule]:
    """Rules by option as a target's table has them."""
    return {f"{SECTION}.{name}": rule for name, rule in rules.items()}


def setting(make: Callable[[Choice], Keys]) -> Rule:
    """The option is some keys, which depend on it and on others."""
    return lambda plan, choice: mapped(make(choice))


def all_options(rule: Callable[[Plan, Choice], Said]) -> dict[str, Rule]:
    """One rule for every option."""
    return train_rules(dict.fromkeys(option_names(), rule))
