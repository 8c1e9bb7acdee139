"""Where the memory of a GPU and the time of a step go: bars with the tables that give their numbers."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from omnicompile.picture import Picture
from omnicompile.plan import Prediction
from omnicompile.report import figures
from omnicompile.report.html import kinds
from omnicompile.report.html.bars import Bar, Part, bars
from omnicompile.report.units import gib, percent, seconds_text

NO_BLOCK = "outside the blocks"
HIDDEN = "hidden behind compute"
_NOTHING = 0.5  # bytes: what rounding leaves of a difference


@dataclass(frozen=True)
class Row:
    """A line of a table: the class of its colour ("" for the sum), and its cells."""

    style: str
    cells: tuple[str, ...]


def memory_bars(prediction: Prediction, picture: Picture) -> Markup:
    """The whole GPU against its capacity, and each block to the same scale."""
    total, capacity = prediction.memory_total, prediction.memory_capacity
    figure = f"{gib(total)} of {gib(capacity)}"
    whole = _memory_parts(prediction.memory)
    if (free := capacity - total) > 0:
        whole = (*whole, Part("free", "m-free", free, gib(free)))
    rows = [Bar("whole GPU", figure, whole)]
    for name, memory in picture.memory.items():
        rows.append(Bar(name, gib(sum(memory.values())), _memory_parts(memory), capacity))
    said = f"{figure}: " + ", ".join(f"{part.label} {part.detail}" for part in whole) + "."
    limit = capacity if free < 0 else 0.0
    return bars("memory", "Memory per GPU", said, rows, max(total, capacity), limit, f"capacity {gib(capacity)}")


def memory_rows(prediction: Prediction, picture: Picture) -> list[Row]:
    """Per kind: bytes in all, their share of the capacity, and by block; then what is free, and the sum."""
    rows = []
    for kind, value in prediction.memory.items():
        if value > 0:
            by_block = [memory.get(kind, 0.0) for memory in picture.memory.values()]
            cells = _memory_cells(kind, value, [*by_block, value - sum(by_block)], prediction)
            rows.append(Row(kinds.memory_class(kind), cells))
    total, sums = prediction.memory_total, [sum(memory.values()) for memory in picture.memory.values()]
    if (free := prediction.memory_capacity - total) > 0:
        rows.append(Row("m-free", _memory_cells("free", free, [0.0] * (len(sums) + 1), prediction)))
    rows.append(Row("", _memory_cells("in use", total, [*sums, total - sum(sums)], prediction)))
    return rows


def step_bars(prediction: Prediction) -> Markup:
    """What makes up the step, and to the same scale what is hidden behind it."""
    shown, hidden = figures.step_parts(prediction)
    whole = prediction.step_seconds
    rows = [Bar("the step", seconds_text(whole), _step_parts(shown))]
    if hidden:
        rows.append(Bar(HIDDEN, seconds_text(sum(hidden.values())), _step_parts(hidden), whole))
    said = ", ".join(f"{kinds.words(kind)} {seconds_text(value)}" for kind, value in (shown | hidden).items())
    return bars("step", "Where the step's time goes", f"{said}.", rows, max(whole, sum(hidden.values())))


def step_tables(prediction: Prediction) -> list[tuple[str, list[Row]]]:
    """(heading, rows) of what makes up the step, and of what is hidden, if anything is."""
    whole = prediction.step_seconds
    tables = []
    for head, found in zip(("the step", HIDDEN), figures.step_parts(prediction)):
        rows = [
            Row(_step_class(kind), (_step_words(kind), seconds_text(value), percent(value / whole) if whole else "-"))
            for kind, value in found.items()
        ]
        tables.append((head, rows))
    return [table for table in tables if table[1]]


def _memory_parts(memory: dict[str, float]) -> tuple[Part, ...]:
    return tuple(Part(kind, kinds.memory_class(kind), value, gib(value)) for kind, value in memory.items() if value > 0)


def _memory_cells(name: str, value: float, places: list[float], prediction: Prediction) -> tuple[str, ...]:
    share = percent(value / prediction.memory_capacity) if prediction.memory_capacity else "-"
    return name, gib(value), share, *(gib(part) if part > _NOTHING else "-" for part in places)


def _step_parts(found: dict[str, float]) -> tuple[Part, ...]:
    return tuple(
        Part(_step_words(kind), _step_class(kind), value, seconds_text(value)) for kind, value in found.items()
    )


def _step_words(kind: str) -> str:
    """What is hidden stands under that heading."""
    return kinds.words(kind.removeprefix("hidden "))


def _step_class(kind: str) -> str:
    return kinds.work_class(kind) + (" soft" if kind.startswith("hidden ") else "")
