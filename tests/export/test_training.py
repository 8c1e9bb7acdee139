"""Training options in other words: every one is accounted for, and a schedule that counts as mapped is the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from target_keys import known, takes

from omnicompile.cluster import Cluster
from omnicompile.export import TARGETS, Export, Outcome, export_plan
from omnicompile.export.training import train_choices
from omnicompile.plan import BlockPlan, Mesh, Plan, Sharding
from omnicompile.train.options import (
    EvaluationOptions,
    OptimizerKind,
    OptimizerOptions,
    ScheduleKind,
    ScheduleOptions,
    TrainOptions,
)
from omnicompile.train.schedule import lr_factor
from omnicompile.workload import Workload

PLAN = Plan("net.py", Cluster(8), Workload(), Mesh(dp_shard=8), {"vision": BlockPlan(), "text": BlockPlan()})
STEPS = st.integers(3, 400)
CHECKED = ("veomni", "torchtitan", "megatron")


@st.composite
def schedules(draw: st.DrawFn) -> TrainOptions:
    steps, kind = draw(STEPS), draw(st.sampled_from(ScheduleKind))
    warmup = draw(st.integers(0, steps // 2))
    decay = draw(st.integers(1, steps - warmup)) if kind is ScheduleKind.WSD else None
    final = draw(st.sampled_from((0.0, 0.1, 0.5)))
    lr = draw(st.sampled_from((1e-5, 3e-4, 0.02)))
    return TrainOptions(
        steps=steps, optimizer=OptimizerOptions(lr=lr), schedule=ScheduleOptions(kind, warmup, final, decay)
    )


@st.composite
def all_options(draw: st.DrawFn) -> TrainOptions:
    optimizer = OptimizerOptions(
        draw(st.sampled_from(OptimizerKind)),
        betas=draw(st.sampled_from(((0.9, 0.95), (0.8, 0.99)))),
        eps=draw(st.sampled_from((1e-8, 1e-6))),
        weight_decay=draw(st.sampled_from((0.0, 0.1))),
    )
    basis = draw(schedules())
    return replace(
        basis,
        epochs=draw(st.sampled_from((None, 2))),
        optimizer=replace(optimizer, lr=basis.optimizer.lr),
        evaluation=draw(st.sampled_from((EvaluationOptions(), EvaluationOptions("data.yaml", 100, 7)))),
        clip=draw(st.sampled_from((None, 1.0, 0.5))),
        freeze=draw(st.sampled_from(((), ("model.visual",)))),
        accumulation=draw(st.sampled_from((None, 4))),
        checkpoint_every=draw(st.sampled_from((None, 50))),
        keep_last=draw(st.sampled_from((1, 3, 5))),
        log_every=draw(st.sampled_from((1, 10))),
        skip_nonfinite=draw(st.sampled_from((0, 3))),
        seed=draw(st.integers(0, 5)),
    )


@pytest.mark.parametrize("target", TARGETS)
@given(options=all_options())
@settings(max_examples=60, deadline=None)
def test_every_option_is_accounted_for(target: str, options: TrainOptions) -> None:
    export = export_plan(PLAN, target, options)
    lines = [line for line in export.lines if line.choice.startswith("train.")]
    assert [line.choice for line in lines] == [choice.title for choice in train_choices(options)]
    assert all(line.said.why for line in export.lost)
    lost = {line.choice for line in export.lost}
    if options.freeze:
        assert "train.freeze" in lost
    if options.skip_nonfinite:
        assert "train.skip_nonfinite" in lost
    if options.accumulation is not None and target != "accelerate":
        assert 4 * 8 in export.keys.values()  # samples of a step


@pytest.mark.parametrize("target", CHECKED)
@given(options=all_options())
@settings(max_examples=60, deadline=None)
def test_keys_are_the_targets_own(target: str, options: TrainOptions) -> None:
    export = export_plan(PLAN, target, options)
    for line in export.lines:
        for key, value in line.said.keys.items() if line.choice.startswith("train.") else ():
            if not key.startswith("optimizer.AdamW."):  # an object: tests/export/test_torchtitan.py
                assert key in known(target)["keys"], key
                assert takes(known(target)["keys"][key], value), (key, value)
    if target == "veomni":
        assert yaml.safe_load(export.text)["train"]["seed"] == options.seed
    if target == "torchtitan":
        compile(export.text, "exported.py", "exec")


def test_what_decides_on_the_weights_is_named_everywhere() -> None:
    options = TrainOptions(
        steps=100,
        epochs=2,
        optimizer=OptimizerOptions(OptimizerKind.MUON),
        schedule=ScheduleOptions(ScheduleKind.WSD, 3, 0.1, 20),
    )
    names = {choice.rule for choice in train_choices(options)}
    assert len(names) == 15 and {"train.optimizer.momentum", "train.schedule.decay", "train.clip"} <= names
    assert all(names <= set(target.rules) for target in TARGETS.values())
    default = {choice.name for choice in train_choices(TrainOptions())}
    assert not {"keep_last", "log_every", "optimizer.momentum", "schedule.final", "steps"} & default
    assert {"epochs", "clip", "seed", "optimizer.lr"} <= default


def test_without_a_section_there_is_nothing_of_training() -> None:
    for target in TARGETS:
        bare = export_plan(PLAN, target)
        assert not any(line.choice.startswith("train.") for line in bare.lines)
    assert "train.optimizer" in export_plan(PLAN, "veomni").to_set
    assert "train.optimizer" not in export_plan(PLAN, "veomni", TrainOptions()).to_set


def veomni_rate(keys: dict[str, Any], steps: int) -> Callable[[int], float]:
    """As the schedulers of VeOmni's veomni/optim/lr_scheduler.py have it."""
    own = {key.removeprefix("train.optimizer."): value for key, value in keys.items()}
    peak, start, least = own["lr"], own.get("lr_start", 0.0), own.get("lr_min", 1e-7)
    warmup = int(steps * own.get("lr_warmup_ratio", 0.0))
    end = int(steps * own.get("lr_decay_ratio", 1.0))

    def rate(step: int) -> float:
        if step < warmup:
            return start + (peak - start) * step / warmup
        if own["lr_decay_style"] == "constant":
            return peak
        if step > end:
            return least
        down = (step - warmup) / max(1, end - warmup)
        return least + (peak - least) * 0.5 * (1 + math.cos(math.pi * down))

    return rate


def megatron_rate(keys: dict[str, Any], steps: int) -> Callable[[int], float]:
    """As OptimizerParamScheduler of Megatron-LM has it, counted in iterations."""
    peak, least = keys["--lr"], keys.get("--min-lr", 0.0)
    warmup, first = keys.get("--lr-warmup-iters", 0), keys.get("--lr-warmup-init", 0.0)
    end, style = keys.get("--lr-decay-iters", steps), keys["--lr-decay-style"]
    assert warmup < end

    def rate(step: int) -> float:
        if warmup and step <= warmup:
            return first + (peak - first) * step / warmup
        if style == "constant":
            return peak
        if step > end:
            return least
        if style == "WSD":
            down = max(0, step - (end - keys["--lr-wsd-decay-iters"])) / keys["--lr-wsd-decay-iters"]
        else:
            down = (step - warmup) / (end - warmup)
        return least + (peak - least) * (0.5 * (1 + math.cos(math.pi * down)) if style == "cosine" else 1 - down)

    return rate


def _is_exact(export: Export) -> bool:
    names = ("train.schedule.kind", "train.schedule.warmup", "train.schedule.final", "train.schedule.decay")
    return all(line.said.outcome is Outcome.MAPPED for line in export.lines if line.choice in names)


@pytest.mark.parametrize(("target", "rate"), [("veomni", veomni_rate), ("megatron", megatron_rate)])
@given(options=schedules())
@settings(max_examples=150, deadline=None)
def test_a_schedule_that_is_mapped_has_the_same_rates(target: str, rate: Any, options: TrainOptions) -> None:
    export = export_plan(PLAN, target, options)
    assume(_is_exact(export))
    steps = options.steps or 0
    theirs = rate(export.keys, steps)
    for step in range(steps):
        ours = options.optimizer.lr * lr_factor(options.schedule, steps, step)
        assert theirs(step) == pytest.approx(ours, rel=1e-9, abs=1e-12), step


@pytest.mark.parametrize(
    ("target", "kinds"),
    [("veomni", {"constant", "cosine"}), ("megatron", set(ScheduleKind)), ("torchtitan", set(ScheduleKind))],
)
def test_these_schedules_are_mapped(target: str, kinds: set[str]) -> None:
    for kind in ScheduleKind:
        schedule = ScheduleOptions(kind, 0, 0.1, 5 if kind is ScheduleKind.WSD else None)
        export = export_plan(PLAN, target, TrainOptions(steps=50, schedule=schedule))
        assert _is_exact(export) is (kind in kinds), kind


def test_muon_goes_where_there_is_one() -> None:
    options = TrainOptions(steps=10, optimizer=OptimizerOptions(OptimizerKind.MUON))
    assert export_plan(PLAN, "veomni", options).keys["train.optimizer.type"] == "muon"
    assert "--optimizer" not in export_plan(PLAN, "megatron", options).keys
    whole = replace(PLAN, blocks={"text": BlockPlan(Sharding.REPLICATE)})
    assert export_plan(whole, "megatron", options).keys["--optimizer"] == "muon"
    titan = export_plan(PLAN, "torchtitan", options)
    assert "config.optimizer" not in titan.text
    assert {f"train.optimizer.{name}" for name in ("name", "lr", "betas")} <= {line.choice for line in titan.lost}
