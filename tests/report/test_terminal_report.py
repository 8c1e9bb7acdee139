"""The plan as a person reads it: what must be said, and how wide it may be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from omnicompile.plan import Plan
from omnicompile.program import Program
from omnicompile.report.program_view import program_text
from omnicompile.report.terminal import plan_text

REASONS = ["0.4 s more exposed [all-to-all]", "every rank computes all images"]


@pytest.fixture
def report(sample_plans: list[Plan], sample_program: Program) -> str:
    return plan_text(sample_plans[0], sample_program, sample_plans[1:], REASONS, width=100)


@pytest.mark.parametrize(
    "said",
    [
        "model.py on 16 x h100 (2 nodes of 8)",
        "6.20 K parameters, 5.30 K active per token",
        "1,000 tokens, 2 images (64 patches each)",
        "8 samples, 8.00 K tokens (1 per micro-batch x 2 micro-steps x 4 data ranks)",
        "dp_shard 4 x sp 4, ep 2 = 16 ranks",
        "chunked loss head",
        "500 tokens/s/GPU, 10.8 s per step, MFU 45.1% (causal; 54.8% by VeOmni's counting)",
        "556 GPU-hours per billion tokens, costing 1,389 at 2.5 per GPU-hour",
        "vision (frozen)",
        "whole images",
        "26.6 GiB of 80.0 GiB per GPU (33.2%)",
        "3.30 s of transfers hidden behind compute",
        "exposed all-gather",
        "hidden all-gather",
        "dp_shard 2 x sp 8, ep 2",
        "-10.0%",
        "0.4 s more exposed [all-to-all]",
        "vision replicated",
        "- limited by memory: activations of [text]",
    ],
)
def test_what_is_said(report: str, said: str) -> None:
    assert said in report


def test_rows_of_blocks(report: str) -> None:
    row = next(line.split() for line in report.splitlines() if line.strip().startswith("text"))
    assert row == ["text", "4.20", "K", "fsdp", "sequence", "4", "2", "selective", "20.0", "GiB", "9.00", "s"]


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_no_line_is_wider_than_asked(sample_plans: list[Plan], sample_program: Program, width: int) -> None:
    text = plan_text(sample_plans[0], sample_program, sample_plans[1:], REASONS, width=width)
    assert max(map(len, text.splitlines())) <= width


def test_a_plan_prints_without_a_program_or_escapes(sample_plans: list[Plan]) -> None:
    text = str(sample_plans[0])
    assert "tokens/s/GPU" in text
    assert "\x1b" not in text


def test_colour_only_when_asked(sample_plans: list[Plan]) -> None:
    assert "\x1b[" in plan_text(sample_plans[0], color=True)


def test_a_plan_that_is_not_priced(sample_plans: list[Plan]) -> None:
    text = plan_text(replace(sample_plans[0], prediction=None))
    assert "not priced" in text
    assert "Memory" not in text


def test_a_plan_that_does_not_fit_says_by_how_much(sample_plans: list[Plan]) -> None:
    prediction = sample_plans[0].prediction
    assert prediction is not None
    small = replace(sample_plans[0], prediction=replace(prediction, memory_capacity=20 * 2**30))
    assert "6.6 GiB TOO MUCH" in plan_text(small)


@pytest.mark.parametrize("width", [60, 80, 100])
def test_names_and_figures_are_whole_at_any_width(
    sample_plans: list[Plan], sample_program: Program, width: int
) -> None:
    tree = program_text(sample_program, sample_program.symbol_values(), width=width)
    assert "text.layers" in tree and "6.00 MFLOP" in tree
    report = plan_text(sample_plans[0], sample_program, width=width)
    assert "20.0 GiB" in report and "4.20 K" in report
    assert "…" not in (tree + report if width > 60 else tree)


def test_the_program_tree(sample_program: Program) -> None:
    text = program_text(sample_program, sample_program.symbol_values(), width=100)
    assert "Sample: 6.20 K parameters, 5.30 K active per token" in text
    assert "1,000 tokens, 2 images, 128 patches" in text
    layers = next(line for line in text.splitlines() if "text.layers" in line)
    # 3 layers: 2,000 x 1,000 tokens FLOPs forward each; 6, 4 and 2 bytes a token saved
    assert layers.split()[-12:] == [
        "4.20",
        "K",
        "6.00",
        "MFLOP",
        "12.0",
        "MFLOP",
        "17.6",
        "KiB",
        "11.7",
        "KiB",
        "5.86",
        "KiB",
    ]
    assert "vision -> text: 16.0 B" in text
    assert "- a note on the [program]" in text
    assert max(map(len, text.splitlines())) <= 100
