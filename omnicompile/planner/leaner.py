"""Whether a plan that takes hardly longer than the fastest needs much less memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from omnicompile.cost_model.step_model import StepModel
from omnicompile.errors import PlanError
from omnicompile.plan import BlockPlan, LossHead, Plan, Prediction, Sharding
from omnicompile.planner.pins import Pins
from omnicompile.planner.predict import simulate
from omnicompile.recompute import Recompute

GIB = 2.0**30
LONGER = 0.005
LEANER = 0.1


def leaner_note(plan: Plan, model: StepModel, pins: Pins) -> str | None:
    """A line on the changes to a simulated plan that, together, save at least 10% of its memory for at most 0.5% more
    time, found one after another; None if there are none. Pinned choices stay."""
    changed, names = plan, list[str]()
    while step := _best_change(plan, changed, model, pins):
        name, changed = step
        names.append(name)
    first, last = _prediction(plan), _prediction(changed)
    if last.memory_total > (1 - LEANER) * first.memory_total:
        return None
    saved = (first.memory_total - last.memory_total) / GIB
    slower = last.step_seconds / first.step_seconds - 1
    words = " ".join(f"--pin {name}" for name in names)
    return f"{saved:.1f} GiB less per GPU for {slower:.2%} more time: {words}"


def _best_change(plan: Plan, now: Plan, model: StepModel, pins: Pins) -> tuple[str, Plan] | None:
    """The change to `now` that saves most and leaves it within the allowed time of `plan`."""
    best: tuple[str, Plan] | None = None
    least = _prediction(now).memory_total
    for name, candidate in _changes(now, pins):
        try:
            candidate = simulate(model.program, candidate, model)
        except PlanError:
            continue
        prediction = _prediction(candidate)
        if prediction.step_seconds <= (1 + LONGER) * _prediction(plan).step_seconds and prediction.memory_total < least:
            best, least = (name, candidate), prediction.memory_total
    return best


def _changes(plan: Plan, pins: Pins) -> Iterator[tuple[str, Plan]]:
    """Single choices that save memory: (as a pin, the changed plan)."""
    if plan.loss_head is LossHead.FULL and pins.allows_step("loss_head", LossHead.CHUNKED):
        yield "loss_head=chunked", replace(plan, loss_head=LossHead.CHUNKED)
    for name, block in plan.blocks.items():
        for field, value, changed in _block_changes(block):
            if field not in pins.blocks.get(name, {}):
                yield f"{name}.{field}={value}", replace(plan, blocks={**plan.blocks, name: changed})


def _block_changes(block: BlockPlan) -> Iterator[tuple[str, str, BlockPlan]]:
    order = list(Recompute)
    if not block.frozen:
        for policy in order[order.index(block.recompute) + 1 :]:
            yield "recompute", policy.value, replace(block, recompute=policy)
    if block.sharding is not Sharding.FSDP:
        yield "sharding", Sharding.FSDP.value, replace(block, sharding=Sharding.FSDP)


def _prediction(plan: Plan) -> Prediction:
    assert plan.prediction is not None, "the plan has not been simulated"
    return plan.prediction
