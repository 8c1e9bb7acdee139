"""FLOPs of the tokens that a step really had: the cost model's, at the sizes of its samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import sympy

from omnicompile.cost_model.step_model import segment_gradients
from omnicompile.cost_model.step_numbers import Evaluator
from omnicompile.planner.predict import is_needed, needed_flops
from omnicompile.program import Program, Sym


@dataclass(frozen=True)
class Work:
    """What micro-batches hold, padding left out. tokens: of text, placeholders included; token_squares: summed over
    samples; patches, images, frames, clips alike."""

    tokens: float = 0.0
    token_squares: float = 0.0
    samples: float = 0.0
    patches: float = 0.0
    patch_squares: float = 0.0
    images: float = 0.0
    frames: float = 0.0
    frame_squares: float = 0.0
    clips: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def symbols(self) -> dict[sympy.Symbol, float]:
        return {
            Sym.S: self.tokens, Sym.S2: self.token_squares, Sym.B: self.samples, Sym.N: self.patches,
            Sym.N2: self.patch_squares, Sym.I: self.images, Sym.A: self.frames, Sym.A2: self.frame_squares,
            Sym.C: self.clips,
        }  # fmt: skip


class StepFlops:
    """FLOPs that `program` itself needs for some work, forward and backward: causal attention counted as half, nothing
    recomputed, of frozen blocks only what gradients elsewhere require.

    Sizes that the program has as a constant (a model that takes one size of image) stay.
    """

    def __init__(self, program: Program, frozen: frozenset[str] = frozenset()) -> None:
        gradients = segment_gradients(program, frozen)
        expressions: list[sympy.Expr] = []
        for segment in program.segments:
            for op in segment.ops:
                if is_needed(op, gradients[segment.name]):
                    pairs = sympy.S.Zero if op.attention is None else op.attention.pairs
                    expressions.append(segment.count * needed_flops(op, op.flops, pairs))
        self._evaluate = Evaluator(expressions)

    def __call__(self, work: Work) -> float:
        return sum(self._evaluate(work.symbols())) if work.tokens else 0.0


def mfu(flops: float, seconds: float, ranks: int, peak: float | None) -> float | None:
    """flops: of all ranks. peak: FLOP/s of one; None where it is not known."""
    if peak is None or not flops or seconds <= 0:
        return None
    return flops / (seconds * ranks * peak)


def block_parameters(program: Program) -> dict[str, set[str]]:
    """Names of the parameters of each block, of all layers of a kind."""
    names: dict[str, set[str]] = {block.name: set() for block in program.blocks}
    for segment in program.segments:
        for path in segment.paths:
            names[segment.block] |= {path + param.name.removeprefix(segment.paths[0]) for param in segment.params}
    return names


def frozen_blocks(program: Program, trained: Mapping[str, bool]) -> frozenset[str]:
    """Blocks none of whose parameters are trained. trained: by parameter name."""
    names = block_parameters(program)
    return frozenset(block for block, own in names.items() if own and not any(trained.get(name) for name in own))
