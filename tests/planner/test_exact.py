"""The planner's optimum equals that of trying everything."""

from __future__ import annotations

import pytest
from brute import brute_force, random_case

from omnicompile.errors import InfeasibleError, PlanError
from omnicompile.planner.api import plan_program


def gap(seed: int, limit: int) -> str:
    """Assert that the planner and the enumeration agree on case `seed`; returns what kind of case it was."""
    case = random_case(seed, limit)
    expected = brute_force(case)
    try:
        whole = {"exchanges": "true", "head_groups": "1", "expert_chunks": "1"}  # which are not searched
        pins = {**case.pins, "priced": "true", **whole}
        result = plan_program(case.program, case.cluster, case.workload, pins)
    except InfeasibleError:
        assert expected is None
        return "infeasible"
    except PlanError:
        assert expected is None
        return "empty"
    prediction = result.plans[0].prediction
    assert prediction is not None and prediction.fits
    assert prediction.step_seconds == expected
    return "tight" if prediction.memory_total > 0.5 * prediction.memory_capacity else "loose"


@pytest.mark.parametrize("seed", range(60))
def test_optimum_equals_enumeration(seed: int) -> None:
    gap(seed, limit=250)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_optimum_equals_enumeration_on_500_cases() -> None:
    kinds = [gap(seed, limit=1500) for seed in range(1000, 1500)]
    assert {"infeasible", "tight", "loose"} <= set(kinds)
