"""torchtitan's words for training options: fields of its configuration, and groups of parameters found by name."""

from __future__ import annotations

from omnicompile.export.choices import Choice
from omnicompile.export.report import Keys, Said, approximated, mapped, refused
from omnicompile.export.rules import Rule, key, never
from omnicompile.export.training import (
    NO_CLIPPING,
    decay_of,
    given,
    optimizer_of,
    schedule_of,
    setting,
    steps_of,
    train_rules,
)
from omnicompile.plan import Plan
from omnicompile.train.options import OptimizerKind, ScheduleKind

ADAMW = "optimizer.AdamW"
"""Arguments of AdamW, which the module's `configure` puts into groups of parameters."""
SCHEDULE = "lr_scheduler"
TYPES = {ScheduleKind.LINEAR: "linear", ScheduleKind.COSINE: "cosine", ScheduleKind.WSD: "linear"}
UNDECAYED = r"(^|\.)(bias|[^.]*norm[^.]*\.weight)$"
"""Names of biases and of norms' weights, which do not decay."""


def _of_adamw(name: str) -> Rule:
    def rule(plan: Plan, choice: Choice) -> Said:
        if optimizer_of(choice).name is not OptimizerKind.ADAMW:
            return refused("goes with the optimizer")
        written = {f"{ADAMW}.{name}": choice.value}
        if name == "weight_decay" and choice.value:
            return approximated("parameters that do not decay are found by name: biases, and weights of norms", written)
        return mapped(written)

    return rule


def optimizer_lines(adamw: Keys) -> list[str]:
    """Statements of the body of `configure`, for the arguments of AdamW."""
    still = adamw | {"weight_decay": 0.0}
    groups = [(UNDECAYED, still), (".*", adamw)] if adamw.get("weight_decay") else [(".*", adamw)]
    lines = ["    config.optimizer = OptimizersContainer.Config(", "        param_groups=["]
    for pattern, arguments in groups:
        lines.append(
            f'            ParamGroupConfig(pattern=r"{pattern}", optimizer_name="AdamW", optimizer_kwargs=dict('
        )
        lines += [f"                {name}={value!r}," for name, value in sorted(arguments.items())]
        lines.append("            )),")
    return [*lines, "        ]", "    )"]


def _name(plan: Plan, choice: Choice) -> Said:
    if choice.value is OptimizerKind.ADAMW:
        return mapped(why="in the groups of parameters")
    return refused("its Muon (DistMuon) is set up in the model's configuration, a matrix at a time")


def _kind(choice: Choice) -> Keys:
    """`total_steps` one below the steps: its schedules would end one step after the last."""
    if choice.value is ScheduleKind.CONSTANT:
        return {f"{SCHEDULE}.decay_ratio": 0.0}
    written: Keys = {
        f"{SCHEDULE}.decay_type": TYPES[choice.value],
        f"{SCHEDULE}.total_steps": max(1, steps_of(choice) - 1),
    }
    return written if choice.value is ScheduleKind.WSD else written | {f"{SCHEDULE}.decay_ratio": None}


def _warmup(plan: Plan, choice: Choice) -> Said:
    """Its step n has (n + 1) / warmup_steps: with one step more that is ours, where the rate stays up for a step."""
    if not choice.value:
        return mapped({f"{SCHEDULE}.warmup_steps": 0})
    kind, exact = schedule_of(choice).kind, {f"{SCHEDULE}.warmup_steps": choice.value + 1}
    if kind is ScheduleKind.CONSTANT:
        return mapped(exact)
    if kind is ScheduleKind.WSD and choice.value + 1 + decay_of(choice) < steps_of(choice):
        return mapped(exact)
    return approximated("at its height one step earlier", {f"{SCHEDULE}.warmup_steps": choice.value})


def _decay(choice: Choice) -> Keys:
    return {f"{SCHEDULE}.decay_ratio": decay_of(choice) / max(1, steps_of(choice) - 1)}


def _keep_last(plan: Plan, choice: Choice) -> Said:
    if choice.value == 1:
        return approximated("it keeps two at least", {"checkpoint.keep_latest_k": 2})
    return mapped({"checkpoint.keep_latest_k": choice.value})


def _epochs(plan: Plan, choice: Choice) -> Said:
    if choice.value is None and given(choice).steps is None:
        return refused("training is counted in steps: set training.steps for one epoch of the data")
    return refused("training is counted in steps, not in epochs")


RULES = train_rules(
    {
        "steps": key("training.steps"),
        "epochs": _epochs,
        "optimizer.name": _name,
        "optimizer.lr": _of_adamw("lr"),
        "optimizer.betas": _of_adamw("betas"),
        "optimizer.eps": _of_adamw("eps"),
        "optimizer.weight_decay": _of_adamw("weight_decay"),
        "optimizer.momentum": never("goes with the optimizer"),
        "optimizer.adamw": never("goes with the optimizer"),
        "schedule.kind": setting(_kind),
        "schedule.warmup": _warmup,
        "schedule.final": key(f"{SCHEDULE}.min_lr_factor"),
        "schedule.decay": setting(_decay),
        "clip": key("training.max_norm", lambda value: NO_CLIPPING if value is None else value),
        "seed": key("debug.seed"),
        "freeze": never("no freezing"),
        "checkpoint_every": setting(lambda choice: {"checkpoint.enable": True, "checkpoint.interval": choice.value}),
        "keep_last": _keep_last,
        "log_every": key("metrics.log_freq"),
        "evaluation.data": never("set validator.dataloader to a data set of its own, and validator.enable"),
        "evaluation.every": key("validator.freq"),
        "evaluation.steps": key("validator.steps"),
    }
)
