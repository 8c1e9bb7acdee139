"""Rules that several targets share. A rule says what one choice of a plan becomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from omnicompile.errors import PlanError
from omnicompile.export.choices import Choice, main_block, shards
from omnicompile.export.report import Keys, Said, approximated, mapped, refused
from omnicompile.plan import Layout, Plan, Sharding

Rule = Callable[[Plan, Choice], Said]


@dataclass(frozen=True)
class Target:
    """A framework. title: its name in sentences. version: what its keys are from. rules: by Choice.rule.
    fixed: keys that do not come from a choice. to_set: what a user has to add; without_train: besides, where the recipe
    has no training options. write: keys and comment lines to the file. launch: how it is started."""

    name: str
    title: str
    version: str
    rules: Mapping[str, Rule]
    fixed: Callable[[Plan], Keys]
    to_set: tuple[str, ...]
    write: Callable[[Keys, list[str]], str]
    launch: Callable[[Plan], str]
    without_train: tuple[str, ...] = ()


def key(name: str, convert: Callable[[Any], Any] = lambda value: value) -> Rule:
    """The choice is one key."""
    return lambda plan, choice: mapped({name: convert(choice.value)})


def keys(make: Callable[[Plan], Keys]) -> Rule:
    """The choice is some keys that depend on the whole plan."""
    return lambda plan, choice: mapped(make(plan))


def same() -> Rule:
    """Nothing to write: the target has it from somewhere else."""
    return lambda plan, choice: mapped()


def only(value: Any, why: str) -> Rule:
    """The target can do nothing but `value`."""
    return lambda plan, choice: mapped() if choice.value == value else refused(why.format(value=choice.value))


def overlap(title: str, sums: Rule) -> dict[str, Rule]:
    """Rules for what is not at its default of how communication runs beside compute. sums: of gradients over replicas
    inside the backward."""
    return {
        "overlap.exchanges": never(title + " schedules its exchanges itself"),
        "overlap.head_groups": never(title + " runs attention over all heads at once"),
        "overlap.expert_chunks": never(title + " exchanges the rows of all experts at once"),
        "overlap.prefetch": never(title + " has no setting for it in this configuration"),
        "overlap.replica_sums": sums,
    }


def never(why: str) -> Rule:
    """The target's configuration does not hold it."""
    return lambda plan, choice: refused(why.format(value=choice.value))


def must_be_one(title: str, what: str) -> Rule:
    """An axis that the target lacks: without it the ranks do not add up, so that nothing is worth writing."""

    def rule(plan: Plan, choice: Choice) -> Said:
        if choice.value != 1:
            raise PlanError(
                f"{title} has no {what}: no configuration of it runs on this mesh ({choice.title}={choice.value}); "
                f"plan with --pin {choice.title}=1"
            )
        return mapped()

    return rule


def of_main(rule: Rule, title: str) -> Rule:
    """The target has one setting for the whole model: that of the main block."""

    def whole(plan: Plan, choice: Choice) -> Said:
        main = main_block(plan)
        if choice.block == main:
            return rule(plan, choice)
        value = getattr(plan.blocks[main], choice.name)
        if choice.value == value:
            return mapped(why=f"as {main}")
        return approximated(f"{title} has one setting for the whole model: {value}, as {main}")

    return whole


def sharding(title: str, replicated: Keys, sharded: Keys) -> Rule:
    """Parameters are sharded over one set of ranks for the whole model."""

    def rule(plan: Plan, choice: Choice) -> Said:
        main = main_block(plan)
        wanted, given = shards(plan, choice.value), shards(plan, plan.blocks[main].sharding)
        written = sharded if given > 1 else replicated
        if choice.block == main:
            if choice.value is Sharding.ZERO1:
                return approximated(f"{title} does not shard the optimizer's state alone: nothing is sharded", written)
            return mapped(written)
        if wanted == given:
            return mapped(why=f"as {main}")
        ways = [f"sharded over {ranks} ranks" if ranks > 1 else "whole on every rank" for ranks in (given, wanted)]
        return approximated(f"{title} shards the whole model one way: {ways[0]}, as {main}, and not {ways[1]}")

    return rule


def layout(title: str, how: Callable[[Plan, Choice], Said]) -> Rule:
    """`how` is asked for the blocks that are cut along the sequence."""

    def rule(plan: Plan, choice: Choice) -> Said:
        if plan.mesh.sp == 1 or choice.value is Layout.SEQUENCE:
            return mapped() if plan.mesh.sp == 1 else how(plan, choice)
        ways = {
            Layout.IMAGES: "whole images or clips are not dealt out",
            Layout.REPLICATED: "no choice of computing a block on every rank of the sequence",
            Layout.BATCH: "no choice of a batch of its own for every rank of the sequence",
        }
        return approximated(f"{title}: {ways[choice.value]}; the block runs as the model's code has it")

    return rule


def block_degree(axis: str) -> Rule:
    """sp or ep of a block: the mesh's, or 1 where the block has nothing to split that way."""

    def rule(plan: Plan, choice: Choice) -> Said:
        degree = getattr(plan.mesh, axis)
        if choice.value == degree:
            return mapped(why=f"mesh.{axis}")
        if axis == "ep" and choice.block != main_block(plan):
            return mapped(why="a block without experts")
        return approximated(f"the degree is one for the whole model: mesh.{axis}={degree}")

    return rule


def resharding(rule: Rule, title: str) -> Rule:
    """Parameters that are whole on every rank are not gathered, so nothing is freed either."""
    one = of_main(rule, title)

    def checked(plan: Plan, choice: Choice) -> Said:
        return mapped() if shards(plan, plan.blocks[choice.block].sharding) == 1 else one(plan, choice)

    return checked
