"""The benchmark of packing prints what it promises."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_the_report_compares_packings_and_balancing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    packing = import_module("packing")
    monkeypatch.setattr(packing, "PACKS", 8)
    monkeypatch.setattr(packing, "RANKS", (4, 8))
    text, reached = packing.report(400, 8192)
    assert ("reached" in text) == reached
    tables = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    best = {cells[2].strip(): float(cells[3].strip(" %")) for cells in tables if cells[1].strip() == "best fit"}
    plain = ("greedy", "one sample a row")
    others = {cells[1].strip(): float(cells[3].strip(" %")) for cells in tables if cells[1].strip() in plain}
    assert best["256"] > others["greedy"] > others["one sample a row"]
    attention = [list(map(float, cells[3:6])) for cells in tables if cells[2:3] == [" attention "]]
    assert len(attention) == 2
    for before, dealt, exchanged in attention:
        assert before >= dealt >= exchanged >= 1
