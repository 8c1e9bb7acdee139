"""The formulas of a block say what the program holds."""

from __future__ import annotations

import pytest

from omnicompile.program import Phase, Program
from omnicompile.recompute import Recompute
from omnicompile.report.formulas import DP_REPLICATE, DP_SHARD, EP, SP, block_formulas, formula_text, formulas_text

ONE = {SP: 1, EP: 1, DP_SHARD: 1, DP_REPLICATE: 1}


def test_formulas_give_the_programs_numbers(sample_program: Program) -> None:
    values = sample_program.symbol_values() | ONE
    for block in sample_program.blocks:
        formulas = {name: float(f.subs(values)) for name, f in block_formulas(sample_program, block).items()}
        segments = sample_program.block_segments(block.name)
        flops = sum(float(op.flops.subs(values)) * s.count for s in segments for op in s.phase_ops(Phase.FORWARD))
        saved = sum(float(s.saved[Recompute.FULL].nbytes.subs(values)) * s.count for s in segments)
        params = sum(s.param_count * s.count for s in segments)
        assert formulas["forward FLOPs"] == pytest.approx(flops)
        assert formulas["saved bytes, full"] == pytest.approx(saved)
        assert formulas["state bytes"] == 16 * params


def test_ranks_share_the_work_and_the_state(sample_program: Program) -> None:
    values = sample_program.symbol_values()
    formulas = block_formulas(sample_program, sample_program.blocks[-1])
    one, four = ({name: float(f.subs(values | ONE | {SP: n})) for name, f in formulas.items()} for n in (1, 4))
    for name in ("forward FLOPs", "saved bytes, none", "state bytes"):
        assert one[name] == pytest.approx(4 * four[name])
    assert one["gathered bytes"] == four["gathered bytes"]


def test_formulas_are_readable(sample_program: Program) -> None:
    text = formulas_text(sample_program)
    assert "forward FLOPs" in text and "text tokens of the micro-batch" in text and "**" not in text
    assert formula_text((2 * DP_SHARD + 3) / SP) == "(2.0 dp_shard + 3.0) / sp"
