"""Captures for tests, with their generic sizes in hand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy
from torch import nn

from omnicompile.capture.build import build_program
from omnicompile.capture.generic import generic_request, generic_sizes
from omnicompile.capture.inputs import input_constraints, make_inputs
from omnicompile.capture.inputs.types import ExampleInputs, InputConstraints
from omnicompile.capture.sample import sample_shape
from omnicompile.capture.trace import trace_forward
from omnicompile.program import Phase, Program, Segment
from omnicompile.workload import Workload


@dataclass(frozen=True)
class Captured:
    """A Program and what turns it into that of another workload."""

    program: Program
    limits: InputConstraints
    inputs: ExampleInputs

    def at(self, workload: Workload) -> Program:
        return replace(self.program, sample=sample_shape(self.limits, self.inputs, workload))

    def grid(self, workload: Workload) -> tuple[int, int]:
        """Patches per side of an image."""
        return (0, 0) if self.limits.images is None else self.limits.images.nearest_grid(*workload.image_size)


def capture(model: nn.Module, workload: Workload, variant: int = 0, repeat: bool = True) -> Captured:
    """Capture with one of the sets of generic sizes. repeat: trace each kind of layer once."""
    model.train()
    limits = input_constraints(model)
    wanted = generic_request(limits, workload, variant)
    inputs = make_inputs(model, wanted.request, check=False)
    traced = trace_forward(model, inputs.kwargs, inputs.host, repeat=repeat)
    sample = sample_shape(limits, inputs, workload)
    program = build_program(model, traced, generic_sizes(inputs, wanted), sample, type(model).__name__, "")
    return Captured(program, limits, inputs)


def evaluate(program: Program, expr: sympy.Expr) -> float:
    """An expression at the program's sample."""
    return float(sympy.sympify(expr).subs(program.symbol_values()))


def flops(program: Program, phase: Phase) -> float:
    """FLOPs of one sample."""
    return sum(evaluate(program, _flops(s, phase)) * s.count for s in program.segments)


def _flops(segment: Segment, phase: Phase) -> sympy.Expr:
    return sum((op.flops for op in segment.phase_ops(phase)), sympy.Integer(0))
