"""The note on a plan that needs much less memory for hardly more time."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import synthetic

from omnicompile.cluster import Cluster
from omnicompile.plan import LossHead, Plan, Sharding
from omnicompile.planner.api import plan_program
from omnicompile.planner.predict import simulate
from omnicompile.program import Program
from omnicompile.recompute import Recompute
from omnicompile.workload import Workload


def planned(program: Program, pins: dict[str, str]) -> Plan:
    return plan_program(program, Cluster(128), Workload(seq_len=program.sample.seq_len), pins).plans[0]


def note_of(plan: Plan) -> str:
    return next((line for line in plan.notes if "less per GPU" in line), "")


def test_the_pins_of_the_note_give_what_it_says() -> None:
    """An encoder that is small beside the language model keeps its activations to save next to no time."""
    program = synthetic.vision_language_72b()
    everything = {"mesh.sp": "1", "text.recompute": "full", "micro_batch": "1"}
    plan = planned(program, everything)
    match = re.fullmatch(r"([\d.]+) GiB less per GPU for ([\d.]+)% more time: (.*)", note_of(plan))
    assert match is not None, plan.notes
    changed = {pin.split("=")[0]: pin.split("=")[1] for pin in match[3].replace("--pin ", "").split()}
    assert changed["vision.recompute"] == "full" and "text.recompute" not in changed
    leaner = simulate(program, _with(plan, changed))
    assert plan.prediction is not None and leaner.prediction is not None
    saved = (plan.prediction.memory_total - leaner.prediction.memory_total) / 2**30
    slower = leaner.prediction.step_seconds / plan.prediction.step_seconds - 1
    assert saved == pytest.approx(float(match[1]), abs=0.06) and slower <= 0.005
    assert slower == pytest.approx(float(match[2]) / 100, abs=6e-5)
    everything |= {"loss_head": "chunked", "vision.recompute": "full", "vision.sharding": "fsdp"}
    assert note_of(planned(program, everything)) == ""


def _with(plan: Plan, changed: dict[str, str]) -> Plan:
    plan = replace(plan, prediction=None, notes=())
    for key, value in changed.items():
        if key == "loss_head":
            plan = replace(plan, loss_head=LossHead(value))
            continue
        name, field = key.split(".")
        kind = Recompute if field == "recompute" else Sharding
        block = replace(plan.blocks[name], **{field: kind(value)})
        plan = replace(plan, blocks={**plan.blocks, name: block})
    return plan
