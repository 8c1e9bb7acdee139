"""Ways of running communication beside compute: the finer ones are chosen for the best plans, and what each gains for a
plan is told, all by the same simulation as the search."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

from omnicompile.cost_model.step_model import StepModel
from omnicompile.plan import Overlap, Plan, Prediction, Sharding
from omnicompile.planner.pins import Pins
from omnicompile.planner.predict import simulate
from omnicompile.planner.rules import has_experts, overlap_refusal

_OFF = Overlap(exchanges=False)


HEAD_GROUPS = (1, 2, 4)
EXPERT_CHUNKS = (1, 2, 4, 8)
"""Values that are tried; others can be pinned."""
MORE_MEMORY = 1.03
"""Peak memory of a plan with them, over that without."""


def refined(plan: Plan, model: StepModel, pins: Pins) -> Plan:
    """The fastest of a simulated plan with early exchanges or without, attention in 1 to 4 groups of heads and experts
    in 1 to 8 chunks, that fits and takes little more memory; of equally fast ones that with fewer. Pins stay."""
    best, limit = plan, MORE_MEMORY * _memory(plan.prediction)
    choices = {"exchanges": (True, False), "head_groups": HEAD_GROUPS, "expert_chunks": EXPERT_CHUNKS}
    wanted = {name: (pins.overlap[name],) if name in pins.overlap else values for name, values in choices.items()}
    for exchanges, groups, chunks in itertools.product(*wanted.values()):
        overlap = replace(plan.overlap, exchanges=exchanges, head_groups=groups, expert_chunks=chunks)
        candidate = replace(plan, overlap=overlap)
        if overlap == plan.overlap or overlap_refusal(model.program, plan.mesh, candidate.overlap):
            continue
        candidate = simulate(model.program, candidate, model)
        prediction = candidate.prediction
        if prediction is None or not prediction.fits or prediction.memory_total > limit:
            continue
        if prediction.step_seconds < _seconds(best.prediction):
            best = candidate
    return best


@dataclass(frozen=True)
class Gain:
    """One field of `Overlap`. value: the plan's. other: the value that it is compared with (off; on where the plan has
    it off). seconds, other_seconds: of a step. reason: why it cannot matter, or ""."""

    name: str
    value: bool | int
    other: bool | int
    seconds: float
    other_seconds: float
    reason: str = ""

    @property
    def on(self) -> bool:
        return self.value != vars(_OFF)[self.name]


def overlap_gains(plan: Plan, model: StepModel) -> tuple[Gain, ...]:
    """plan: simulated."""
    assert plan.prediction is not None
    seconds = plan.prediction.step_seconds
    found = []
    for name, value in vars(plan.overlap).items():
        off = vars(_OFF)[name]
        other = off if value != off else _on(name)
        reason = _pointless(name, plan, model)
        changed = seconds
        candidate = replace(plan, overlap=_changed(plan.overlap, name, other))
        reason = reason or overlap_refusal(model.program, plan.mesh, candidate.overlap) or ""
        if not reason:
            changed = _seconds(simulate(model.program, candidate, model).prediction)
        found.append(Gain(name, value, other, seconds, changed, reason))
    return tuple(found)


def _changed(overlap: Overlap, name: str, value: bool | int) -> Overlap:
    """Without early exchanges there is nothing for groups and chunks to hide."""
    changes: dict[str, Any] = {name: value}
    if name == "exchanges" and not value:
        changes |= {"head_groups": 1, "expert_chunks": 1}
    return replace(overlap, **changes)


def _on(name: str) -> bool | int:
    return 2 if name in ("head_groups", "expert_chunks") else True


def _seconds(prediction: Prediction | None) -> float:
    assert prediction is not None
    return prediction.step_seconds


def _memory(prediction: Prediction | None) -> float:
    assert prediction is not None
    return prediction.memory_total


def _pointless(name: str, plan: Plan, model: StepModel) -> str:
    exchanges = any(block.sp > 1 for block in plan.blocks.values())
    experts = plan.mesh.ep > 1 and any(has_experts(model.program, block) for block in plan.blocks)
    if name == "exchanges" and not (exchanges or experts):
        return "no exchanges (sp = 1, ep = 1)"
    if name == "head_groups" and not exchanges:
        return "heads are not exchanged (sp = 1)"
    if name == "expert_chunks" and not experts:
        return "rows of experts are not exchanged (ep = 1)"
    shared = plan.mesh.world > 1 and any(block.sharding is not Sharding.FSDP for block in plan.blocks.values())
    if name == "replica_sums" and not (shared or plan.mesh.dp_replicate > 1):
        return "no parameters with replicas"
    if name == "prefetch":
        sharded = any(block.sharding in (Sharding.FSDP, Sharding.HSDP) for block in plan.blocks.values())
        gathered = "parameters are gathered while the layer before computes; further ahead is priced alike, so pin it"
        return gathered if sharded and plan.mesh.world > 1 else "no parameters are gathered"
    return ""


def gain_lines(gains: tuple[Gain, ...]) -> list[str]:
    """A line each: what is on and what it gains; what is off and what it would."""
    lines = []
    for gain in gains:
        state = f"{gain.name}={str(gain.value).lower()}"
        if gain.reason:
            lines.append(f"  {state}: {gain.reason}")
            continue
        change = gain.other_seconds / gain.seconds - 1
        how = "as fast" if abs(change) < 5e-5 else f"{abs(change):.2%} {'slower' if change > 0 else 'faster'}"
        lines.append(f"  {state}: with {str(gain.other).lower()} the step is {how} ({gain.other_seconds:.3f} s)")
    return lines
