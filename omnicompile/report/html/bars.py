"""Stacked bars as wide as the page, whatever its width: memory against capacity, and the parts of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from markupsafe import Markup

from omnicompile.report.html import svg

ROW, BAR, TOP = 54.0, 22.0, 21.0
NAME = 190.0
LABEL_SIZE = 11.5
WIDTH = 860.0
"""Of the narrowest page on which parts are labelled."""


@dataclass(frozen=True)
class Part:
    """A piece of a bar. style: its class. detail: what the pointer is told besides the label."""

    label: str
    style: str
    value: float
    detail: str


@dataclass(frozen=True)
class Bar:
    """name on the left and figure on the right, above the parts. track: how far an empty bar reaches behind them."""

    name: str
    figure: str
    parts: tuple[Part, ...]
    track: float = 0.0
    begin: float = 0.0


def bars(
    key: str, title: str, description: str, rows: Sequence[Bar], scale: float, limit: float = 0.0, limit_words: str = ""
) -> Markup:
    """scale: the value of the whole width. limit: where to draw a line across all bars (0: none)."""
    children = [_bar(row, index * ROW, scale) for index, row in enumerate(rows)]
    height = len(rows) * ROW - 6
    if limit and scale:
        at = svg.share(limit / scale)
        children.append(svg.line(at, TOP - 5, at, height, class_="limit"))
        anchor = "end" if limit / scale > 0.5 else "start"
        children.append(svg.text(at, height + 13, limit_words, class_="small muted", text_anchor=anchor))
        height += 18
    return svg.drawing(key, title, description, children, width="100%", height=height, class_="bars")


def _bar(row: Bar, y: float, scale: float) -> Markup:
    body: list[str] = [
        svg.text(0, y + 13, svg.fit(row.name, NAME, 13), svg.tag("title", row.name), class_="strong"),
        svg.text("100%", y + 13, row.figure, class_="figure", text_anchor="end"),
    ]
    if row.track:
        body.append(svg.rect(0, y + TOP, svg.share(row.track / scale), BAR, rx=3, class_="track"))
    starts = accumulate((part.value for part in row.parts), initial=row.begin)
    for part, start in zip(row.parts, starts):
        body.append(_part(part, start / scale if scale else 0.0, part.value / scale if scale else 0.0, y + TOP))
    return svg.group(*body)


def _part(part: Part, start: float, size: float, y: float) -> Markup:
    told = svg.tag("title", f"{part.label}: {part.detail}")
    body = [svg.rect(svg.share(start), y, svg.share(size), BAR, told, class_=f"part {part.style}")]
    if svg.text_width(part.label, LABEL_SIZE) + 14 < size * WIDTH:
        at = svg.share(start + size / 2)
        body.append(svg.text(at, y + 15.5, part.label, class_=f"inside {part.style}", text_anchor="middle"))
    return svg.group(*body)
