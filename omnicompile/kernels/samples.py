"""Problems made into tensors: what the measurements run, and the tests compare.

The shape of a problem, by operator:
    attention              batch, heads, queries, key heads, keys, value head size, causal, packed, window
    grouped_mm             experts, n, k
    rms_norm, swiglu       rows, width
    rope                   batch, heads, sequence, head size
    cross_entropy          tokens, classes
    linear_cross_entropy   tokens, hidden, classes
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from omnicompile.kernels.attention.call import Call
from omnicompile.kernels.registry import Functions, Problem

IGNORED = -100
_ROWS_PER_EXPERT = 256
# Sizes that are rounded up to a power of two: what a time for one serves for the other.
_CLASSED: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {"attention": (2, 4, 8), "rms_norm": (0,), "swiglu": (0,), "rope": (2,), "cross_entropy": (0,),
     "linear_cross_entropy": (0,)}
)  # fmt: skip

_MOST_ROWS: Mapping[str, int] = MappingProxyType(
    {"rms_norm": 2**16, "swiglu": 2**15, "cross_entropy": 2**12, "linear_cross_entropy": 2**12}
)

Run = Callable[[Functions], list[Tensor]]


def shape_class(problem: Problem) -> Problem:
    """The problem that stands for all of about its size. Many rows take a time that grows with their number, whichever
    implementation it is: some thousands stand for more."""
    shape = list(problem.shape)
    for place in _CLASSED.get(problem.operator, ()):
        shape[place] = 2 ** math.ceil(math.log2(shape[place])) if shape[place] > 0 else shape[place]
    if problem.operator in _MOST_ROWS:
        shape[0] = min(shape[0], _MOST_ROWS[problem.operator])
    return replace(problem, shape=tuple(shape))


def sample(problem: Problem, device: torch.device, seed: int = 0, widened: torch.dtype | None = None) -> Run:
    """A function that runs an implementation's forward and backward on tensors of the problem, and gives back the
    value and the gradients. widened: the dtype of the tensors, whose values are those of the problem's dtype."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator).to(problem.dtype)
        return values.to(device, widened or problem.dtype)

    return _SAMPLES[problem.operator](problem, normal, device)


Normal = Callable[..., Tensor]


def _attention(problem: Problem, normal: Normal, device: torch.device) -> Run:
    batch, heads, queries, kv_heads, keys, v_size, causal, packed, window = problem.shape
    size = problem.head_size
    q, grad = normal(batch, queries, heads, size).transpose(1, 2), normal(batch, queries, heads, v_size).transpose(1, 2)
    k, v = normal(batch, keys, kv_heads, size).transpose(1, 2), normal(batch, keys, kv_heads, v_size).transpose(1, 2)
    cu_q, cu_k = (_bounds(length, device) if packed else None for length in (queries, keys))
    sinks = normal(heads) if "sinks" in problem.facts else None
    cap = 30.0 if "softcap" in problem.facts else 0.0
    call = Call(cu_q, cu_k, sinks, bool(causal), size**-0.5, window, cap)

    def run(functions: Functions) -> list[Tensor]:
        out, lse = functions.forward(q, k, v, call)
        return [out, *functions.backward(grad, q, k, v, out, lse, call)]

    return run


def _bounds(length: int, device: torch.device) -> Tensor:
    """Four segments: an eighth, a quarter, nothing, the rest but for one position at the end."""
    ends = [0, length // 8, length * 3 // 8, length * 3 // 8, length - 1]
    return torch.tensor(ends, dtype=torch.int32, device=device)


def _grouped(problem: Problem, normal: Normal, device: torch.device) -> Run:
    experts, n, k = problem.shape
    counts = torch.full((experts,), _ROWS_PER_EXPERT, device=device)
    counts[0] = 0
    rows, grad = normal((experts - 1) * _ROWS_PER_EXPERT + 5, k), normal((experts - 1) * _ROWS_PER_EXPERT + 5, n)
    weight = normal(experts, n, k)

    def run(functions: Functions) -> list[Tensor]:
        out = functions.forward(rows, weight, counts, False)
        d_rows = functions.forward(grad, weight, counts, True)
        return [out, d_rows, functions.backward(rows, grad, counts, False)]

    return run


def _rms_norm(problem: Problem, normal: Normal, device: torch.device) -> Run:
    rows, width = problem.shape
    x, grad, weight = normal(rows, width), normal(rows, width), normal(width)
    early = problem.variant == "plain"

    def run(functions: Functions) -> list[Tensor]:
        y, root = functions.forward(x, weight, 1e-6, 0.0, early)
        return [y, *functions.backward(grad, x, weight, root, 0.0, early)]

    return run


def _swiglu(problem: Problem, normal: Normal, device: torch.device) -> Run:
    gate, up, grad = (normal(*problem.shape) for _ in range(3))
    return lambda functions: [functions.forward(gate, up), *functions.backward(grad, gate, up)]


def _rope(problem: Problem, normal: Normal, device: torch.device) -> Run:
    batch, heads, length, size = problem.shape
    x, grad = (normal(batch, length, heads, size).transpose(1, 2) for _ in range(2))
    half_cos, half_sin = (normal(batch, 1, length, size // 2) for _ in range(2))
    cos, sin = torch.cat((half_cos, half_cos), -1), torch.cat((half_sin, half_sin), -1)
    return lambda functions: [functions.forward(x, cos, sin), functions.backward(grad, cos, sin)]


def _targets(tokens: int, classes: int, device: torch.device) -> Tensor:
    target = torch.arange(tokens, device=device) * 7 % classes
    target[::5] = IGNORED
    return target


def _cross_entropy(problem: Problem, normal: Normal, device: torch.device) -> Run:
    tokens, classes = problem.shape
    logits, target = normal(tokens, classes), _targets(tokens, classes, device)
    return lambda functions: list(functions.forward(logits, target, IGNORED))


def _linear_cross_entropy(problem: Problem, normal: Normal, device: torch.device) -> Run:
    tokens, width, classes = problem.shape
    hidden, weight = normal(tokens, width), normal(classes, width)
    target = _targets(tokens, classes, device)
    return lambda functions: list(functions.forward(hidden, weight, target, IGNORED))


_SAMPLES: Mapping[str, Callable[[Problem, Normal, torch.device], Run]] = MappingProxyType(
    {
        "attention": _attention,
        "grouped_mm": _grouped,
        "rms_norm": _rms_norm,
        "swiglu": _swiglu,
        "rope": _rope,
        "cross_entropy": _cross_entropy,
        "linear_cross_entropy": _linear_cross_entropy,
    }
)
