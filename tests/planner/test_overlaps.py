"""What overlapping gains, and that the search turns on what does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import synthetic

from omnicompile.cluster import Cluster
from omnicompile.cost_model.step_model import StepModel
from omnicompile.errors import PlanError
from omnicompile.plan import Overlap, Plan
from omnicompile.planner.api import PlanResult, plan_program
from omnicompile.planner.overlaps import MORE_MEMORY, gain_lines
from omnicompile.planner.predict import simulate
from omnicompile.program import Program
from omnicompile.workload import Workload


def planned(program: Program, **pins: str) -> PlanResult:
    workload = Workload(program.sample.seq_len, global_batch=64)
    return plan_program(program, Cluster(64), workload, {k.replace("__", "."): v for k, v in pins.items()})


def seconds(program: Program, plan: Plan) -> float:
    prediction = simulate(program, plan, StepModel(program, plan.cluster)).prediction
    assert prediction is not None
    return prediction.step_seconds


def test_each_gain_is_that_of_a_simulated_plan() -> None:
    program = synthetic.dense_lm(32768)
    result = planned(program, mesh__sp="4")
    best = result.plans[0]
    assert best.prediction is not None and best.overlap.exchanges
    gains = {gain.name: gain for gain in result.gains}
    late = replace(best, overlap=Overlap(exchanges=False, replica_sums=best.overlap.replica_sums))
    assert gains["exchanges"].other_seconds == seconds(program, late) > best.prediction.step_seconds
    assert gains["exchanges"].on and not gains["exchanges"].reason
    assert gains["expert_chunks"].reason
    text = "\n".join(gain_lines(result.gains))
    assert "exchanges=true: with false the step is" in text and "slower" in text


def test_sums_over_replicas_are_in_the_backward_only_where_they_gain() -> None:
    program = synthetic.vision_language_72b()
    pins = {"mesh__sp": "1", "mesh__dp_replicate": "4", "micro_batch": "1", "vision__sharding": "replicate"}
    result = planned(program, **pins)
    best = result.plans[0]
    both = {
        inside: seconds(program, replace(best, overlap=replace(best.overlap, replica_sums=inside)))
        for inside in (False, True)
    }
    assert best.overlap.replica_sums == (both[True] < both[False])
    assert seconds(program, best) == min(both.values())


def test_pins_of_overlap_are_kept() -> None:
    program = synthetic.dense_lm(32768)
    best = planned(program, mesh__sp="4", overlap__exchanges="false").plans[0]
    assert best.overlap == Overlap(exchanges=False)
    with pytest.raises(PlanError, match="must be true or false"):
        planned(program, exchanges="maybe")


def test_finer_ways_are_taken_where_they_gain() -> None:
    """Rows of experts that travel for longer than a chunk computes are cut into chunks."""
    program = synthetic.moe_lm(65536)
    pins = {"mesh__sp": "1", "mesh__ep": "8", "mesh__dp_replicate": "1"}
    result = planned(program, **pins)
    best = result.plans[0]
    assert best.prediction is not None and best.overlap.expert_chunks > 1
    whole = replace(best, overlap=replace(best.overlap, expert_chunks=1))
    assert best.prediction.step_seconds < seconds(program, whole)
    plain = simulate(program, whole, StepModel(program, whole.cluster)).prediction
    assert plain is not None and best.prediction.memory_total <= MORE_MEMORY * plain.memory_total
    gain = next(gain for gain in result.gains if gain.name == "expert_chunks")
    assert gain.on and gain.other == 1 and gain.other_seconds == seconds(program, whole)
    assert planned(program, **pins, expert_chunks="1").plans[0].overlap.expert_chunks == 1


@pytest.mark.parametrize("length", [4096, 32768])
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_no_way_is_on_that_the_simulation_says_is_slower(kind: str, length: int) -> None:
    program = synthetic.dense_lm(length) if kind == "dense" else synthetic.moe_lm(length)
    pins = {"mesh__sp": "4"} if kind == "dense" else {"mesh__sp": "1", "mesh__ep": "8"}
    result = planned(program, **pins)
    assert [gain.name for gain in result.gains] == list(vars(Overlap()))
    for gain in result.gains:
        assert gain.reason or not gain.on or gain.other_seconds >= gain.seconds, gain
    assert len(gain_lines(result.gains)) == len(result.gains)


def test_what_cannot_be_cut_is_refused() -> None:
    program = synthetic.moe_lm()
    for pin, reason in ({"expert_chunks": "3"}, "does not divide the 16 experts"), ({"head_groups": "2"}, "sp=1"):
        with pytest.raises(PlanError, match=reason):
            planned(program, mesh__sp="1", mesh__ep="8", **pin)
