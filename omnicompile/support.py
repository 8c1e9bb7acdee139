"""What the runtime executes today.

The planner can price more. It considers the rest only when asked to, says so in a plan's notes, and the runtime refuses
such a plan.
"""

from __future__ import annotations

from dataclasses import fields

from omnicompile.errors import PlanError
from omnicompile.plan import BlockPlan, Layout, Plan, Sharding


def refuse_unexecutable(plan: Plan) -> None:
    """Raises PlanError for a plan that cannot be executed yet."""
    if unsupported := not_executable(plan):
        raise PlanError(f"the plan asks for what cannot be executed yet: {'; '.join(unsupported)}")


def not_executable(plan: Plan) -> tuple[str, ...]:
    """The choices of a plan that `parallelize` cannot execute yet, each with the pin that avoids it."""
    found = []
    for name, block in plan.blocks.items():
        found += [f"{name}: {what} ({name}.{key} avoids it)" for key, what in block_not_executable(block).items()]
    degrees = {"tp": plan.mesh.tp, "cp": plan.mesh.cp, "pp": plan.mesh.pp}
    found += [f"{axis} (mesh.{axis}=1 avoids it)" for axis, degree in degrees.items() if degree > 1]
    stack = {f.name: (getattr(plan.stack, f.name), f.default) for f in fields(plan.stack)}
    found += [
        f"{name}={value} of another software stack ({_avoided(name, default)})"
        for name, (value, default) in stack.items()
        if value != default
    ]
    return tuple(found)


def _avoided(name: str, default: object) -> str:
    return f"stack.{name}={default} avoids it" if default != "" else f"leaving out stack.{name} avoids it"


def block_not_executable(block: BlockPlan) -> dict[str, str]:
    """By the pin that avoids it, what of a block's choices cannot be executed yet."""
    found = {}
    if block.sharding is Sharding.ZERO1:
        found["sharding=fsdp"] = "only the optimizer's state sharded"
    return found


def block_on_request(block: BlockPlan) -> dict[str, str]:
    """By the pin that avoids it, what of a block's choices is only planned when asked for: what cannot be executed,
    what runs but not with every batch of the budget, and what takes host memory, for which the price has no limit."""
    found = block_not_executable(block)
    if block.offload:
        found["offload=false"] = "activations in host memory"
    if block.layout is Layout.IMAGES and block.sp > 1:
        found["layout=sequence"] = "whole images dealt out to ranks, with room on each for those of every batch"
    return found
