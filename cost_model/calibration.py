"""Fitting constants of the cost model to measured times; no torch.

A group of constants is fitted on the logarithm of time with a soft L1 loss, so that a relative error counts the same
for short and long operations and a few outliers do not decide. `M` is what the constants are part of: one Hardware, or
several by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

M = TypeVar("M")
SOFT = 0.05
"""Errors (of the logarithm) above which the loss grows linearly."""


@dataclass(frozen=True)
class Point(Generic[M]):
    """One measurement: `predict` gives the model's seconds. source: what it is reported and weighted with."""

    source: str
    seconds: float
    predict: Callable[[M], float]

    def error(self, machine: M) -> float:
        """log(predicted / measured)"""
        return log(self.predict(machine) / self.seconds)


@dataclass(frozen=True)
class Group(Generic[M]):
    """Constants fitted together. apply: the machine with their values put in; first, low, high: start and bounds.
    sole: sources without which some constant is not determined; they are never held out."""

    name: str
    points: Sequence[Point[M]]
    apply: Callable[[M, Sequence[float]], M]
    first: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    sole: tuple[str, ...] = ()

    def fit(self, machine: M, without: str = "") -> list[float]:
        """Values of the constants; points of the source `without` are left out."""
        points = [point for point in self.points if point.source != without]
        counts = {p.source: sum(q.source == p.source for q in points) for p in points}
        weights = np.array([counts[p.source] ** -0.25 for p in points])  # a large source counts more, not in proportion

        def residuals(x: NDArray[np.float64]) -> NDArray[np.float64]:
            changed = self.apply(machine, list(x))
            return weights * np.array([point.error(changed) for point in points])

        scale = np.maximum(np.abs(self.first), 1e-3)
        result = least_squares(
            residuals, self.first, bounds=(self.low, self.high), x_scale=scale, loss="soft_l1", f_scale=SOFT,
            diff_step=np.full(len(self.first), 1e-3), max_nfev=40,
        )  # fmt: skip
        return [float(value) for value in result.x]

    def loss(self, machine: M) -> float:
        """Of a machine as it is: the mean of what the fit makes small."""
        errors = np.array([point.error(machine) for point in self.points])
        return float(np.mean(2.0 * (np.sqrt(1.0 + (errors / SOFT) ** 2) - 1.0))) if errors.size else 0.0

    def fitted(self, machine: M) -> M:
        """The machine with the fitted constants; as it is where there is nothing to fit them to."""
        return self.apply(machine, self.fit(machine)) if self.points else machine

    def held_out(self, machine: M) -> dict[str, list[float]]:
        """Errors of each source under constants that were fitted without it."""
        out = {}
        for source in dict.fromkeys(point.source for point in self.points):
            if source.startswith(self.sole or "-"):
                continue
            changed = self.apply(machine, self.fit(machine, without=source))
            out[source] = [point.error(changed) for point in self.points if point.source == source]
        return out


@dataclass(frozen=True)
class Errors:
    """Of predicted times, as ratios less one. median, p90 (90th percentile): without sign. bias: median with sign."""

    source: str
    points: int
    median: float
    p90: float
    bias: float


def errors_of(source: str, logs: Sequence[float]) -> Errors:
    """logs: log(predicted / measured), at least one."""
    sizes = np.expm1(np.abs(logs))
    bias = float(np.expm1(np.median(logs)))
    return Errors(source, len(logs), float(np.median(sizes)), float(np.quantile(sizes, 0.9)), bias)


def errors_by_source(points: Sequence[Point[M]], machine: M) -> list[Errors]:
    """In the order in which sources first occur."""
    logs: dict[str, list[float]] = {}
    for point in points:
        logs.setdefault(point.source, []).append(point.error(machine))
    return [errors_of(source, found) for source, found in logs.items()]


def number_text(value: float, digits: int = 3) -> str:
    """So many digits, in a form that YAML reads as a float."""
    text = f"{value:.{digits}g}" if 1e-3 <= value < 10.0**digits or value == 0 else f"{value:.{digits - 1}e}"
    return text if "." in text else text.replace("e", ".0e") if "e" in text else text + ".0"
