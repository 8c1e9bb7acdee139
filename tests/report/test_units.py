"""Numbers as a person reads them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnicompile.report.units import bytes_text, count_text, digits, flops_text, gib, percent, seconds_text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.0123, "0.0123"), (1, "1.00"), (9.996, "10.0"), (99.96, "100"), (1234.4, "1,234")]
)
def test_three_digits(value: float, text: str) -> None:
    assert digits(value) == text


def test_units() -> None:
    assert bytes_text(1536) == "1.50 KiB"
    assert bytes_text(3 * 2**30) == "3.00 GiB"
    assert gib(2**20 * 512) == "0.5 GiB"
    assert count_text(73_405_560_320) == "73.4 B"
    assert count_text(12) == "12"
    assert flops_text(33.6e12) == "33.6 TFLOP"
    assert flops_text(12) == "12 FLOP"
    assert percent(0.451) == "45.1%"
    assert percent(1e-5) == "<0.1%"
    assert percent(0) == "0.0%"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (12.34, "12.3 s"), (0.3304, "330 ms"), (4.56e-3, "4.56 ms"), (2e-6, "2.00 us"), (7500, "2 h 05 min")],
)
def test_seconds(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


@given(st.floats(0, 1e30))
def test_no_number_is_shown_with_an_exponent(value: float) -> None:
    for text in (bytes_text(value), count_text(value), flops_text(value), seconds_text(value), digits(value)):
        assert "e" not in text.replace("sec", "")
