"""Throughput and memory over sample lengths and GPU counts: a few points each, those that do not fit among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from omnicompile.picture import Curve, Point
from omnicompile.plan import Prediction
from omnicompile.report import figures
from omnicompile.report.html import svg
from omnicompile.report.html.ticks import nice_step, tick_text
from omnicompile.report.units import GIB, digits, gib, percent, seconds_text

WIDTH, HEIGHT = 480.0, 250.0
RIGHT, TOP, BOTTOM = 16.0, 36.0, 46.0
INSET = 26.0  # of the first and last point
TEXT = 14.0
"""The largest size of the style sheet: that of a phone."""
LIMIT_WORDS = "capacity"
AXIS_WORDS = {"seq_len": "tokens per sample", "gpus": "GPUs"}
BEYOND = 1.35
"""Of a memory chart: times the capacity, the highest value that is drawn at its height."""


@dataclass(frozen=True)
class Measure:
    """What a chart shows of a prediction. limit: a line across (None: none)."""

    title: str
    unit: str
    of: Callable[[Prediction], float]
    words: Callable[[float], str]
    limit: float | None = None


THROUGHPUT = Measure("Throughput", "tokens/s/GPU", lambda p: p.tokens_per_second_per_gpu, digits)


def memory_measure(capacity: float) -> Measure:
    return Measure("Memory", "GiB per GPU", lambda p: p.memory_total / GIB, lambda v: f"{v:,.1f}", capacity / GIB)


def chart(key: str, curve: Curve, measure: Measure) -> Markup:
    """One measure over one axis: the planned points joined, the kept choices dashed behind them."""
    planned, kept = curve.planned or curve.kept, curve.kept if curve.planned else ()
    values = sorted({point.value for point in (*curve.planned, *curve.kept)})
    frame = _Frame(tuple(values), _top(curve, measure), measure)
    body: list[str] = [*_grid(frame), *_axis(frame, curve)]
    if measure.limit is not None:
        body += _limit(frame, measure)
    body += _trail(frame, kept, "kept") + _trail(frame, planned, "planned")
    crowded = {point.value for point in kept if frame.has(point) and _is_above(frame, point, planned)}
    crowded |= {point.value for point in planned if frame.limit_above(point)}
    body += [_mark(frame, point, curve.now, point.value in crowded) for point in planned]
    title = f"{measure.title} over {AXIS_WORDS[curve.axis]}"
    said = "; ".join(f"{point.value:,}: {point_words(point, measure)}" for point in planned)
    box = f"0 0 {svg.number(WIDTH)} {svg.number(HEIGHT)}"
    return svg.drawing(key, title, f"{measure.unit}. {said}.", body, viewBox=box, class_="chart")


def any_misfit(curve: Curve) -> bool:
    """Whether a point is drawn as one that does not fit."""
    return any(point.plan is not None and not point.fits for point in (*curve.planned, *curve.kept))


def point_words(point: Point, measure: Measure) -> str:
    """The value, and whether it fits; or why there is none."""
    if point.plan is None or point.plan.prediction is None:
        return point.reason or "no plan"
    value = f"{measure.words(measure.of(point.plan.prediction))} {measure.unit}"
    return value if point.fits else f"{value}, does not fit"


def point_rows(curve: Curve) -> list[tuple[str, ...]]:
    """For a table: size, tokens/s/GPU, MFU, step, memory, mesh and micro-batch of each point."""
    rows: list[tuple[str, ...]] = []
    for point in curve.planned or curve.kept:
        plan, prediction = point.plan, point.plan.prediction if point.plan is not None else None
        if plan is None or prediction is None:
            rows.append((f"{point.value:,}", "-", "-", "-", "-", point.reason))
            continue
        memory = gib(prediction.memory_total) + ("" if prediction.fits else " (does not fit)")
        speed = [digits(prediction.tokens_per_second_per_gpu), percent(prediction.mfu)]
        choices = f"{figures.mesh_words(plan.mesh)}; micro-batch {plan.micro_batch} x {plan.accumulation}"
        rows.append((f"{point.value:,}", *speed, seconds_text(prediction.step_seconds), memory, choices))
    return rows


@dataclass(frozen=True)
class _Frame:
    """Where values stand in the drawing."""

    values: tuple[int, ...]
    top: float
    measure: Measure

    @property
    def left(self) -> float:
        """Where the lines begin: beside the widest tick."""
        return 14 + max(svg.text_width(words, TEXT) for _, words in self.ticks())

    @property
    def right(self) -> float:
        """Where the lines end: before the words of a limit."""
        room = svg.text_width(LIMIT_WORDS, TEXT) if self.measure.limit is not None else 0.0
        return WIDTH - RIGHT - room

    def ticks(self) -> list[tuple[float, str]]:
        step = nice_step(self.top / 5)
        scale, unit = (1e3, " K") if self.top >= 1e5 else (1.0, "")
        values = [number * step for number in range(int(self.top / step) + 1)]
        return [(value, f"{tick_text(value / scale, step / scale)}{unit}" if value else "0") for value in values]

    def x(self, value: int) -> float:
        if len(self.values) == 1:
            return (self.left + self.right) / 2
        step = (self.right - self.left - 2 * INSET) / (len(self.values) - 1)
        return self.left + INSET + self.values.index(value) * step

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - min(value / self.top, 1.0) * (HEIGHT - TOP - BOTTOM)

    def has(self, point: Point) -> bool:
        """Whether the point stands at a height of its own: what does not fit has memory, but no throughput."""
        return self.value(point) is not None and (point.fits or self.measure.limit is not None)

    def height(self, point: Point) -> float:
        return self.y(self.value(point) or 0.0) if self.has(point) else HEIGHT - BOTTOM - 12

    def limit_above(self, point: Point) -> bool:
        """Whether the line of the limit would run through the words above the point."""
        limit = self.measure.limit
        return limit is not None and 5 < self.height(point) - self.y(limit) < 26

    def value(self, point: Point) -> float | None:
        if point.plan is None or point.plan.prediction is None:
            return None
        return self.measure.of(point.plan.prediction)


def _top(curve: Curve, measure: Measure) -> float:
    """The value at the upper edge: above all that is drawn, or not far above a limit."""
    priced = [
        (point.fits or measure.limit is not None, measure.of(point.plan.prediction))
        for point in (*curve.planned, *curve.kept)
        if point.plan is not None and point.plan.prediction is not None
    ]
    drawn = [value for shown, value in priced if shown] or [value for _, value in priced]
    highest = max(drawn, default=1.0) * 1.08
    return highest if measure.limit is None else min(max(highest, 1.15 * measure.limit), BEYOND * measure.limit)


def _grid(frame: _Frame) -> list[Markup]:
    body = []
    for value, words in frame.ticks():
        y = frame.y(value)
        body.append(svg.line(frame.left, y, frame.right, y, class_="grid" if value else "base"))
        body.append(svg.text(frame.left - 7, y + 4, words, class_="tick", text_anchor="end"))
    return body


def _axis(frame: _Frame, curve: Curve) -> list[Markup]:
    body = []
    for value in frame.values:
        style = "tick now" if value == curve.now else "tick"
        body.append(svg.text(frame.x(value), HEIGHT - BOTTOM + 18, f"{value:,}", class_=style, text_anchor="middle"))
    middle = (frame.left + frame.right) / 2
    body.append(svg.text(middle, HEIGHT - 7, AXIS_WORDS[curve.axis], class_="axis", text_anchor="middle"))
    body.append(svg.text(0, 13, f"{frame.measure.title}, {frame.measure.unit}", class_="chart-title"))
    return body


def _limit(frame: _Frame, measure: Measure) -> list[Markup]:
    assert measure.limit is not None
    y = frame.y(measure.limit)
    words = svg.text(frame.right + 6, y - 1, LIMIT_WORDS, class_="limit-words")
    value = svg.text(frame.right + 6, y + 13, measure.words(measure.limit), class_="limit-words")
    return [svg.line(frame.left, y, frame.right, y, class_="limit"), words, value]


def _trail(frame: _Frame, points: Sequence[Point], style: str) -> list[Markup]:
    """A line through neighbouring points; for the kept choices also through what does not fit but has a place."""
    parts: list[list[str]] = [[]]
    for point in points:
        if not frame.has(point) or (style == "planned" and not point.fits):
            parts.append([])
        else:
            parts[-1].append(f"{svg.number(frame.x(point.value))} {svg.number(frame.height(point))}")
    lines = [svg.tag("path", d="M" + "L".join(part), class_=f"trail {style}") for part in parts if len(part) > 1]
    beyond = [point for point in points if style == "kept" and frame.has(point) and not point.fits]
    return [*lines, *(_cross(frame, point, "cross kept") for point in beyond)]


def _cross(frame: _Frame, point: Point, style: str) -> Markup:
    x, y = frame.x(point.value), frame.height(point)
    told = svg.tag("title", _told(point, frame.measure))
    path = f"M{svg.number(x - 5)} {svg.number(y - 5)}l10 10m0 -10l-10 10"
    return svg.tag("path", told, d=path, class_=style)


def _is_above(frame: _Frame, kept: Point, planned: Sequence[Point]) -> bool:
    """Whether a point of the kept choices stands where the words of the planned one would."""
    other = next((point for point in planned if point.value == kept.value and frame.has(point)), None)
    return other is not None and 0 < frame.height(other) - frame.height(kept) < 50


def _mark(frame: _Frame, point: Point, now: int, below: bool) -> Markup:
    x, y, value = frame.x(point.value), frame.height(point), frame.value(point)
    if point.fits and value is not None:
        style = "point now" if point.value == now else "point"
        told = svg.tag("title", _told(point, frame.measure))
        dot = svg.tag("circle", told, cx=x, cy=y, r=6 if point.value == now else 4.5, class_=style)
        words = svg.text(
            x, y + 20 if below else y - 11, frame.measure.words(value), class_="value halo", text_anchor="middle"
        )
        return svg.group(dot, words)
    if value is None:
        said = "no plan"
    else:
        said = frame.measure.words(value) if frame.has(point) else "no fit"
    below = below or y < TOP + 16
    words = svg.text(x, y + 20 if below else y - 11, said, class_="value bad halo", text_anchor="middle")
    return svg.group(_cross(frame, point, "cross"), words)


def _told(point: Point, measure: Measure) -> str:
    words = f"{point.value:,}: {point_words(point, measure)}"
    if point.plan is None:
        return words
    return f"{words}; {figures.mesh_words(point.plan.mesh)}, micro-batch {point.plan.micro_batch}"
