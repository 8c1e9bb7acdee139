"""Megatron-LM's arguments for training options; its schedules are counted in iterations, from 0 as ours."""

from __future__ import annotations

from omnicompile.export.choices import Choice
from omnicompile.export.report import Keys, Said, approximated, mapped, refused
from omnicompile.export.rules import key, never
from omnicompile.export.training import decay_of, given, optimizer_of, schedule_of, setting, steps_of, train_rules
from omnicompile.plan import Plan, Sharding
from omnicompile.train.options import OptimizerKind, ScheduleKind

STYLES = {ScheduleKind.WSD: {"--lr-decay-style": "WSD", "--lr-wsd-decay-style": "linear"}}


def _name(plan: Plan, choice: Choice) -> Said:
    if choice.value is OptimizerKind.ADAMW:
        return mapped({"--optimizer": "adam"})
    if any(block.sharding is not Sharding.REPLICATE for block in plan.blocks.values()):
        return refused(
            "its Muon goes with whole parameters on every rank: give --optimizer dist_muon, or plan with those"
        )
    return approximated("its Muon has its own choice of matrices and of scale", {"--optimizer": "muon"})


def _betas(choice: Choice) -> Keys:
    return {"--adam-beta1": choice.value[0], "--adam-beta2": choice.value[1]}


def _kind(choice: Choice) -> Keys:
    if choice.value is ScheduleKind.CONSTANT:
        return {"--lr-decay-style": "constant"}
    # The end of the way down is its last iteration, which is one below their number.
    last = max(steps_of(choice) - 1, schedule_of(choice).warmup + 1)
    return {"--lr-decay-style": str(choice.value), "--lr-decay-iters": last} | STYLES.get(choice.value, {})


def _warmup(plan: Plan, choice: Choice) -> Said:
    if not choice.value:
        return mapped()
    first = optimizer_of(choice).lr / (choice.value + 1)
    written = {"--lr-warmup-iters": choice.value, "--lr-warmup-init": first}
    if schedule_of(choice).kind is ScheduleKind.WSD and choice.value + decay_of(choice) >= steps_of(choice):
        return approximated("the rate is at its height for one step before it goes down", written)
    return mapped(written)


def _epochs(plan: Plan, choice: Choice) -> Said:
    if choice.value is None and given(choice).steps is None:
        return refused("training is counted in iterations: give --train-iters for one epoch of the data")
    return refused("training is counted in iterations, not in epochs")


def _seed(plan: Plan, choice: Choice) -> Said:
    return mapped({"--seed": choice.value}) if choice.value > 0 else refused("its seeds are above 0")


RULES = train_rules(
    {
        "steps": key("--train-iters"),
        "epochs": _epochs,
        "optimizer.name": _name,
        "optimizer.lr": key("--lr"),
        "optimizer.betas": setting(_betas),
        "optimizer.eps": key("--adam-eps"),
        "optimizer.weight_decay": key("--weight-decay"),  # not of parameters of one dimension, as ours
        "optimizer.momentum": key("--muon-momentum"),
        "optimizer.adamw": never("it finds out itself what Muon leaves to Adam"),
        "schedule.kind": setting(_kind),
        "schedule.warmup": _warmup,
        "schedule.final": setting(lambda choice: {"--min-lr": optimizer_of(choice).lr * choice.value}),
        "schedule.decay": setting(lambda choice: {"--lr-wsd-decay-iters": decay_of(choice)}),
        "clip": key("--clip-grad", lambda value: value or 0.0),
        "seed": _seed,
        "freeze": never("no freezing of the language model"),
        "checkpoint_every": key("--save-interval"),
        "log_every": key("--log-interval"),
        "evaluation.data": never("give --valid-data-path, or a split of the data"),
        "evaluation.every": key("--eval-interval"),
        "evaluation.steps": key("--eval-iters"),
    }
)
