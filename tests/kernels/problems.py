"""Small problems of every operator, and implementations against the reference in float64."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from omnicompile.kernels.registry import Kernel, Problem
from omnicompile.kernels.samples import sample
from omnicompile.kernels.table import find_kernel


def attention_problems(hardware: str, dtype: torch.dtype) -> list[Problem]:
    """Dense, packed and windowed, causal and not, with fewer key heads, with fewer queries than keys."""
    shapes = {
        "dense": [(2, 4, 48, 4, 48, 32, 1, 0, 0), (1, 4, 48, 2, 48, 32, 0, 0, 0), (1, 4, 20, 2, 48, 32, 1, 0, 0)],
        "packed": [(1, 4, 48, 4, 48, 32, 1, 1, 0), (1, 4, 48, 2, 48, 32, 0, 1, 0)],
        "windowed": [(1, 4, 48, 2, 48, 32, 1, 0, 5), (1, 4, 48, 2, 48, 32, 0, 0, 5), (1, 4, 48, 2, 48, 32, 1, 1, 5)],
    }
    return [Problem("attention", v, hardware, dtype, shape, 32) for v, found in shapes.items() for shape in found]


def problems(operator: str, hardware: str, dtype: torch.dtype) -> list[Problem]:
    if operator == "attention":
        plain = attention_problems(hardware, dtype)
        return [
            *plain,
            replace(plain[0], facts=frozenset({"softcap"})),
            replace(plain[3], facts=frozenset({"softcap"})),
        ]
    variant, shapes = {
        "grouped_mm": ("rows", [(3, 16, 24)]),
        "rms_norm": ("plain", [(10, 32), (3, 80)]),
        "swiglu": ("plain", [(10, 48)]),
        "rope": ("plain", [(1, 4, 6, 8), (2, 3, 6, 16)]),
        "cross_entropy": ("sum", [(12, 40)]),
        "linear_cross_entropy": ("sum", [(12, 16, 40)]),
    }[operator]
    return [
        Problem(operator, variant, hardware, dtype, shape, shape[-1] if operator == "rope" else 0) for shape in shapes
    ]


def worst_error(kernel: Kernel, problem: Problem, device: torch.device) -> float:
    """Largest ||difference|| / ||right|| over the value and every gradient. Right is the reference in float64 on the
    CPU, on the same numbers as the implementation is given."""
    got = sample(problem, device)(kernel.functions())
    exact = find_kernel(problem.operator, "reference").functions()
    want = _in_double(problem)(exact)
    assert [tuple(t.shape) for t in got] == [tuple(t.shape) for t in want]
    return max((_error(a, b) for a, b in zip(got, want) if b.numel()), default=0.0)


def _error(got: Tensor, want: Tensor) -> float:
    assert bool(torch.isfinite(got).all())
    return float((got.detach().cpu().double() - want).norm() / want.norm().clamp(min=1e-30))


def _in_double(problem: Problem):  # type: ignore[no-untyped-def]
    """The sample's tensors are rounded to the problem's dtype before they are widened."""
    return sample(problem, torch.device("cpu"), widened=torch.float64)
