"""`--json`: plain data, complete and unrounded."""

from __future__ import annotations

import json

import pytest

from omnicompile.plan import Plan
from omnicompile.program import Program
from omnicompile.report.json_view import plan_json, plans_json, program_json


def test_plans(sample_plans: list[Plan], sample_program: Program) -> None:
    view = json.loads(json.dumps(plans_json(sample_plans, ["", "more", "most"], sample_program)))
    assert view["plan"]["mesh"]["sp"] == 4
    assert view["plan"]["blocks"]["vision"]["layout"] == "images"
    assert view["plan"]["samples_per_step"] == 8
    assert view["plan"]["prediction"]["cost_per_billion_tokens"] == pytest.approx(2.5 * 1e9 / (500 * 3600))
    assert view["plan"]["prediction"]["fits"] is True
    assert [entry["why_it_lost"] for entry in view["alternatives"]] == ["more", "most"]
    assert view["program"] == {
        "name": "Sample",
        "parameters": 6200,
        "active_parameters": 5300,
        "blocks": {"vision": 2000, "text": 4200},
    }


def test_reasons_must_match_the_plans(sample_plans: list[Plan]) -> None:
    with pytest.raises(ValueError):
        plans_json(sample_plans, [""], None)


def test_a_plan_without_prediction_or_price(sample_plans: list[Plan]) -> None:
    from dataclasses import replace

    view = plan_json(replace(sample_plans[0], prediction=None))
    assert view["prediction"] is None


def test_program(sample_program: Program) -> None:
    view = json.loads(json.dumps(program_json(sample_program, sample_program.symbol_values())))
    text = view["blocks"][1]
    assert text["parameters"] == 4200
    assert text["segments"][0]["forward_flops_each"] == 2e6
    assert text["segments"][0]["saved_bytes_each"] == {
        "none": 6000,
        "selective": 4000,
        "except_attention": 3000,
        "full": 2000,
    }
    assert view["symbols"]["S"] == 1000
    assert view["edges"] == [{"source": "vision", "target": "text", "bytes": 16}]
