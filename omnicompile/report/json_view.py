"""Plans and programs as plain data for programs (`--json`): units in the names, nothing rounded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy

from omnicompile.plan import Plan
from omnicompile.program import Phase, Program, Segment
from omnicompile.recompute import Recompute
from omnicompile.report import figures
from omnicompile.schema import encode


def plans_json(plans: Sequence[Plan], reasons: Sequence[str], program: Program | None) -> dict[str, Any]:
    """The best plan, the next best with why each lost, and the model's sizes."""
    if not plans:
        raise ValueError("no plan to show")
    view: dict[str, Any] = {"plan": plan_json(plans[0])}
    view["alternatives"] = [
        {"why_it_lost": reason, "plan": plan_json(plan)}
        for plan, reason in zip(plans[1:], list(reasons)[1:], strict=True)
    ]
    if program is not None:
        view["program"] = {
            "name": program.name,
            "parameters": program.param_count,
            "active_parameters": figures.active_param_count(program),
            "blocks": {block.name: figures.block_params(program, block.name) for block in program.blocks},
        }
    return view


def plan_json(plan: Plan) -> dict[str, Any]:
    """All fields of a plan as a recipe holds them, and what follows from them."""
    view: dict[str, Any] = encode(plan)
    view["ranks"] = plan.mesh.world
    view["samples_per_step"] = plan.global_batch
    view["tokens_per_step"] = plan.global_batch * plan.workload.seq_len
    if plan.prediction is not None:
        view["prediction"] |= {
            "memory_total": plan.prediction.memory_total,
            "fits": plan.prediction.fits,
            "gpu_hours_per_billion_tokens": figures.gpu_hours_per_billion_tokens(plan.prediction),
            "cost_per_billion_tokens": figures.cost_per_billion_tokens(plan),
        }
    return view


def program_json(program: Program, values: dict[sympy.Symbol, float]) -> dict[str, Any]:
    """The blocks of a program and their segments at the symbol values of one sample."""
    return {
        "name": program.name,
        "source": program.source,
        "parameters": program.param_count,
        "active_parameters": figures.active_param_count(program),
        "symbols": {str(symbol): value for symbol, value in values.items()},
        "blocks": [
            {
                "name": block.name,
                "kind": block.kind,
                "path": block.path,
                "parameters": figures.block_params(program, block.name),
                "segments": [_segment_json(segment, values) for segment in program.block_segments(block.name)],
            }
            for block in program.blocks
        ],
        "edges": [
            {"source": edge.source, "target": edge.target, "bytes": number(edge.nbytes, values)}
            for edge in program.edges
        ],
        "notes": list(program.notes),
    }


def number(expression: sympy.Expr, values: dict[sympy.Symbol, float]) -> float:
    """The value of `expression` where every symbol has a value."""
    return float(sympy.sympify(expression).xreplace({key: sympy.Float(value) for key, value in values.items()}))


def segment_flops(segment: Segment, phase: Phase, values: dict[sympy.Symbol, float]) -> float:
    """FLOPs of one instance, attention without the causal discount."""
    return sum(number(op.flops, values) for op in segment.phase_ops(phase))


def saved_bytes(segment: Segment, values: dict[sympy.Symbol, float]) -> dict[Recompute, float]:
    """Bytes that one instance keeps for its backward under each recompute policy, its parameters trained."""
    return {policy: number(saved.nbytes, values) for policy, saved in segment.saved.items()}


def _segment_json(segment: Segment, values: dict[sympy.Symbol, float]) -> dict[str, Any]:
    return {
        "name": segment.name,
        "role": segment.role,
        "count": segment.count,
        "paths": list(segment.paths),
        "parameters_each": segment.param_count,
        "expert_parameters_each": segment.expert_param_count,
        "forward_flops_each": segment_flops(segment, Phase.FORWARD, values),
        "backward_flops_each": segment_flops(segment, Phase.BACKWARD, values),
        "saved_bytes_each": {policy.value: nbytes for policy, nbytes in saved_bytes(segment, values).items()},
        "input_bytes_each": number(segment.input_bytes, values),
        "output_bytes_each": number(segment.output_bytes, values),
    }
