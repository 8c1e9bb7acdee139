"""The cost of each modality block as formulas in the workload and the degrees of the mesh (`inspect --formulas`)."""

from __future__ import annotations

import sympy

from omnicompile.program import SYMBOLS, Block, Expr, Phase, Program, Segment, Sym
from omnicompile.recompute import Recompute
from omnicompile.report.units import count_text

DP_SHARD, DP_REPLICATE, SP, EP = (sympy.Symbol(n, positive=True) for n in ("dp_shard", "dp_replicate", "sp", "ep"))
MEANINGS = {
    Sym.S: "text tokens of the micro-batch",
    Sym.S2: "their squared segment lengths, summed (S^2 for one segment)",
    Sym.N: "vision patches",
    Sym.N2: "the squared patch counts of the images, summed",
    Sym.I: "images",
    Sym.A: "audio frames",
    Sym.A2: "the squared frame counts of the clips, summed",
    Sym.C: "audio clips",
    Sym.B: "samples",
}
DIGITS = 4
MASTER_AND_ADAM = 12  # bytes: float32 weight and two moments
GRADIENT = 4
COMPUTE = 2  # bytes of a gathered bfloat16 weight


def block_formulas(program: Program, block: Block) -> dict[str, Expr]:
    """FLOPs and bytes of one micro-step on one rank whose block is split over sp (1 for another layout), with fsdp.

    forward / backward FLOPs: attention in full, without the causal discount. saved: bytes kept for the backward, by
    recompute policy. state: float32 weights, two Adam moments and float32 gradients; bfloat16 weights alone of what the
    model does not let be trained. gathered: the largest layer's weights in bfloat16. all-gather: bytes of all weights
    gathered once.
    """
    segments = program.block_segments(block.name)
    formulas = {
        "forward FLOPs": _flops(segments, Phase.FORWARD) / SP,
        "backward FLOPs": _flops(segments, Phase.BACKWARD) / SP,
    }
    for policy in Recompute:
        formulas[f"saved bytes, {policy.value}"] = (
            sum((s.saved[policy].nbytes * s.count for s in segments if policy in s.saved), sympy.S.Zero) / SP
        )
    expert = sum(s.expert_param_count * s.count for s in segments)
    dense = sum(s.param_count * s.count for s in segments) - expert
    ranks = DP_REPLICATE * DP_SHARD * SP
    untrained = sum(p.numel * s.count for s in segments for p in s.params if not (p.trained or p.tied_to))
    state = (MASTER_AND_ADAM + GRADIENT) * (dense + expert - untrained) + COMPUTE * untrained
    formulas["state bytes"] = sympy.Integer(state) / ranks
    formulas["gathered bytes"] = sympy.Max(
        *(
            COMPUTE * ((s.param_count - s.expert_param_count) + sympy.Integer(s.expert_param_count) / EP)
            for s in segments
        )
    )
    formulas["all-gather bytes"] = COMPUTE * (sympy.Integer(dense) + sympy.Integer(expert) / EP)
    return formulas


def _flops(segments: tuple[Segment, ...], phase: Phase) -> Expr:
    return sum((op.flops * s.count for s in segments for op in s.phase_ops(phase)), sympy.S.Zero)


def formulas_text(program: Program) -> str:
    """Every block's formulas, numbers to four digits, after what the symbols mean."""
    blocks = {block.name: block_formulas(program, block) for block in program.blocks}
    used = {symbol for formulas in blocks.values() for formula in formulas.values() for symbol in formula.free_symbols}
    lines = [f"{program.name}: {count_text(program.param_count)} parameters; one micro-step on one rank", ""]
    lines += [f"  {symbol!s:<3} {MEANINGS[symbol]}" for symbol in SYMBOLS if symbol in used]
    for name, formulas in blocks.items():
        lines += ["", name]
        width = max(map(len, formulas))
        lines += [f"  {title:<{width}}  {formula_text(formula)}" for title, formula in formulas.items()]
    lines += [
        "",
        "sp is 1 for a block that is not split along the sequence; sharding fsdp; attention without the causal mask",
    ]
    return "\n".join(lines)


def formula_text(formula: Expr) -> str:
    """The formula over one denominator, terms sorted by degree, numbers to four digits."""
    numerator, denominator = sympy.fraction(sympy.together(formula))
    text, below = (_plain(sympy.N(sympy.expand(part), DIGITS)) for part in (numerator, denominator))
    if denominator == 1:
        return text
    above = f"({text})" if " + " in text else text
    return f"{above} / ({below})" if " " in below else f"{above} / {below}"


def _plain(formula: Expr) -> str:
    return str(formula).replace("**", "^").replace("*", " ")


def formulas_json(program: Program) -> dict[str, dict[str, str]]:
    """Formulas as sympy reads them, exact."""
    return {
        block.name: {title: str(formula) for title, formula in block_formulas(program, block).items()}
        for block in program.blocks
    }
