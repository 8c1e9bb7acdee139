"""Plans as configurations of other frameworks, with an exact account of what those cannot say.

`export_plan(plan, "veomni")` gives the file and, for every choice of the plan, whether it is mapped, approximated or
refused and why. A target is one module with a table of rules; `keys/` lists the keys that each target knows.
"""

from __future__ import annotations

from dataclasses import replace

from omnicompile.errors import InputError, PlanError
from omnicompile.export import accelerate, megatron, torchtitan, veomni
from omnicompile.export.choices import Choice, choices_of
from omnicompile.export.report import Export, Keys, Line, Outcome, Said, lost_lines, refused
from omnicompile.export.rules import Target
from omnicompile.export.training import train_choices
from omnicompile.plan import Plan
from omnicompile.schema import suggestion
from omnicompile.train.options import TrainOptions

__all__ = ["TARGETS", "Export", "Line", "Outcome", "export_plan"]

TARGETS = {target.name: target for target in (veomni.TARGET, torchtitan.TARGET, accelerate.TARGET, megatron.TARGET)}


def export_plan(plan: Plan, target: str, train: TrainOptions | None = None) -> Export:
    """`plan` as a configuration of `target`, with the training options `train` where they are given.

    Raises InputError for an unknown target or a plan without blocks, PlanError where the target lacks an axis of the
    mesh, so that no configuration of it would run.
    """
    if target not in TARGETS:
        raise InputError(f"--to {target}: no such framework{suggestion(target, TARGETS)}")
    if not plan.blocks:
        raise InputError("the recipe has no blocks: nothing to export")
    found = TARGETS[target]
    if train is not None and train.accumulation is not None:
        plan = replace(plan, accumulation=train.accumulation)
    choices = choices_of(plan) + (train_choices(train) if train is not None else [])
    keys = found.fixed(plan)
    lines = []
    for choice in choices:
        said = _said(found, plan, choice)
        _merge(keys, said.keys, choice)
        lines.append(Line(choice.title, str(choice.value), said))
    to_set = found.to_set if train is not None else (*found.to_set, *found.without_train)
    export = Export(found.name, found.version, "", keys, tuple(lines), to_set)
    return replace(export, text=found.write(keys, _header(found, plan, export)))


def _said(target: Target, plan: Plan, choice: Choice) -> Said:
    rule = target.rules.get(choice.rule)
    return rule(plan, choice) if rule is not None else refused(f"{target.title} has no such setting")


def _merge(keys: Keys, more: Keys, choice: Choice) -> None:
    for name, value in more.items():
        if keys.setdefault(name, value) != value:
            raise PlanError(f"{choice.title} wants {name}={value}, and another choice {name}={keys[name]}")


def _header(target: Target, plan: Plan, export: Export) -> list[str]:
    """Comment lines for the head of the file."""
    lines = [f"{target.title} configuration, written by omnicompile export; keys of {target.version}."]
    lines += [f"Model of the plan: {plan.model}.", f"Start with: {target.launch(plan)}"]
    lines += [f"To set yourself: {what}" for what in export.to_set]
    lines += ["Not as planned:"] if export.lost else ["All choices of the plan are in it."]
    return lines + [f"  {text}" for text in lost_lines(export.lost)]
