"""Two plans of one model beside each other: in which choices they differ, and what that costs where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from omnicompile.plan import OURS, Plan, Prediction

SECONDS, GIB = 1e-4, 2.0**30


def prediction(plan: Plan) -> Prediction:
    assert plan.prediction is not None
    return plan.prediction


def fields_of(plan: Plan) -> dict[str, str]:
    """The plan's choices by the names that pins give them."""
    found = {f"mesh.{name}": str(value) for name, value in vars(plan.mesh).items()}
    found |= {"micro_batch": str(plan.micro_batch), "accumulation": str(plan.accumulation)}
    found |= {"loss_head": str(plan.loss_head), "offload_optimizer": str(plan.offload_optimizer).lower()}
    found |= {f"overlap.{name}": str(value).lower() for name, value in vars(plan.overlap).items()}
    found |= {f"stack.{name}": str(value) for name, value in vars(plan.stack).items() if value != vars(OURS)[name]}
    for block, choices in plan.blocks.items():
        found |= {f"{block}.{name}": str(value) for name, value in vars(choices).items()}
    return found


def describe(plan: Plan, than: Plan | None = None) -> str:
    """The choices that differ from `than`; without it the ones that say most."""
    if than is not None:
        before, after = fields_of(than), fields_of(plan)
        as_executed = {k: str(vars(OURS)[k.removeprefix("stack.")]) for k in before.keys() - after.keys()}
        return ", ".join(f"{k}={v}" for k, v in (after | as_executed).items() if before.get(k) != v)
    mesh = ", ".join(f"{name}={value}" for name, value in vars(plan.mesh).items() if value > 1)
    blocks = "; ".join(
        f"{name}: {b.sharding}, {b.layout}, recompute {b.recompute}{', frozen' if b.frozen else ''}"
        for name, b in plan.blocks.items()
    )
    step = f"micro-batch {plan.micro_batch}, {prediction(plan).step_seconds:.3f} s a step"
    return f"{mesh or 'one rank'}; {blocks}; {step}"


def speed_words(plan: Plan, than: Plan) -> str:
    """ "3.1% slower (1.031 s a step instead of 1.000 s)"."""
    ours, theirs = prediction(than).step_seconds, prediction(plan).step_seconds
    change = theirs / ours - 1
    speed = "as fast" if abs(change) < 5e-4 else f"{abs(change):.1%} {'slower' if change > 0 else 'faster'}"
    return f"{speed} ({theirs:.3f} s a step instead of {ours:.3f} s)"


def cost_lines(plan: Plan, than: Plan) -> list[str]:
    """A line each for time, memory and compute by block: what `plan` has more (+) or less (-) than `than`."""
    ours, theirs = prediction(than), prediction(plan)
    return [
        *_line("time", ours.time, theirs.time, SECONDS, lambda x: f"{x:+.3f} s"),
        *_line("memory per GPU", ours.memory, theirs.memory, GIB / 100, lambda x: f"{x / GIB:+.2f} GiB"),
        *_line("compute by block", ours.block_time, theirs.block_time, SECONDS, lambda x: f"{x:+.3f} s"),
    ]


def changes(ours: dict[str, float], theirs: dict[str, float], least: float) -> dict[str, float]:
    """What the other has more (+) or less (-), largest first, without what hardly differs."""
    found = {kind: theirs.get(kind, 0.0) - ours.get(kind, 0.0) for kind in {*ours, *theirs}}
    return dict(sorted(((k, v) for k, v in found.items() if abs(v) >= least), key=lambda item: -abs(item[1])))


def _line(
    title: str, ours: dict[str, float], theirs: dict[str, float], least: float, word: Callable[[float], str]
) -> list[str]:
    found = changes(ours, theirs, least)
    return [f"  {title}: {', '.join(f'{kind} {word(value)}' for kind, value in found.items())}"] if found else []


def comparison_json(plan: Plan, than: Plan) -> dict[str, Any]:
    ours, theirs = prediction(than), prediction(plan)
    return {
        "choices": fields_of(plan),
        "step_seconds": theirs.step_seconds,
        "time": changes(ours.time, theirs.time, 0.0),
        "memory": changes(ours.memory, theirs.memory, 0.0),
    }
