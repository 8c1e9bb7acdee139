"""Round places on an axis."""

from __future__ import annotations

import math


def nice_step(rough: float) -> float:
    """The least of 1, 2, 5, 10, ... (times a power of ten) that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    return next((factor * power for factor in (1, 2, 5) if factor * power >= rough * (1 - 1e-9)), 10 * power)


def tick_text(value: float, step: float) -> str:
    """`value` to the precision that ticks of `step` need: 250, 2.5, 0.02."""
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{places}f}"
