"""The last micro-step as lanes of tasks. The drawing has no width of its own: zooming makes it wider than its frame."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from omnicompile.cost_model.schedule import COMPUTE, STREAMS
from omnicompile.picture import Picture, StepTask, Stretch
from omnicompile.report.html import kinds, svg
from omnicompile.report.html.ticks import nice_step, tick_text
from omnicompile.report.units import plural

ZOOMS = (1, 2, 4, 8, 16, 32)
PIXELS = 1000.0 * 16
"""Marks shorter than a step divided by this are joined with their neighbours."""
MOST_MARKS = 2400
TICKS = 8
LANE, LANE_GAP, RIBBON = 26.0, 8.0, 22.0
RIBBON_TOP = 22.0
FIRST_LANE = RIBBON_TOP + RIBBON + LANE_GAP
HEIGHT = FIRST_LANE + len(STREAMS) * (LANE + LANE_GAP)
WAIT = "wait"


@dataclass(frozen=True)
class Mark:
    """A task, or neighbours in a lane too short to be seen apart. kind: of the longest; kinds: of all."""

    kind: str
    kinds: tuple[str, ...]
    block: str
    name: str
    count: int
    start: float
    end: float
    longest: float

    def with_next(self, task: Mark) -> Mark:
        """Both as one."""
        longer = task if task.longest > self.longest else self
        among = tuple(dict.fromkeys((*self.kinds, *task.kinds)))
        count = self.count + task.count
        return Mark(longer.kind, among, longer.block, "", count, self.start, task.end, longer.longest)


def lanes(picture: Picture) -> dict[str, list[Mark]]:
    """Marks by stream; those of the compute lane say also where compute waits."""
    shortest = picture.seconds / PIXELS
    tasks = {stream: _marks(picture.tasks, stream, picture.seconds) for stream in STREAMS}
    while True:
        joined = {stream: join(marks, shortest) for stream, marks in tasks.items()}
        if sum(map(len, joined.values())) <= MOST_MARKS:
            return joined
        shortest *= 2


def join(marks: Iterable[Mark], shortest: float) -> list[Mark]:
    """Neighbours in a row, of which one is shorter than `shortest` and which are no farther apart, become one."""
    joined: list[Mark] = []
    for mark in marks:
        last = joined[-1] if joined else None
        small = last is not None and min(last.end - last.start, mark.end - mark.start) < shortest
        if last is not None and small and mark.start - last.end < shortest and mark.end - last.start < 2 * shortest:
            joined[-1] = last.with_next(mark)
        else:
            joined.append(mark)
    return joined


def timeline(picture: Picture) -> Markup:
    """Ticks, the phases of the step, and a lane for each stream."""
    found = lanes(picture)
    body: list[str] = [_ticks(picture.seconds, zoom) for zoom in ZOOMS]
    body += [_stretch(stretch, picture.seconds) for stretch in picture.stretches]
    for number, marks in enumerate(found.values()):
        y = FIRST_LANE + number * (LANE + LANE_GAP)
        body.append(svg.rect(0, y, "100%", LANE, class_="lane"))
        body += [_mark(mark, picture.seconds, y) for mark in marks]
        if not marks:
            body.append(svg.text(8, y + 17, "none", class_="small muted"))
    said = ", ".join(f"{kinds.STREAM_WORDS[stream]}: {_busy(picture.tasks, stream):.1%}" for stream in STREAMS)
    description = f"When each stream of a GPU is at work; share of the time: {said}."
    title = "Timeline of the last micro-step"
    return svg.drawing("timeline", title, description, body, width="100%", height=HEIGHT, class_="lanes z1")


def lane_names() -> list[tuple[str, float]]:
    """Words beside the lanes, with where they stand."""
    places = [FIRST_LANE + number * (LANE + LANE_GAP) for number in range(len(STREAMS))]
    return [("phase", RIBBON_TOP), *((kinds.STREAM_WORDS[s], y) for s, y in zip(STREAMS, places))]


def legend(picture: Picture) -> list[tuple[str, str]]:
    """(class, words) of the kinds that occur, compute first."""
    order = {kind: number for number, kind in enumerate(kinds.WORK)}
    found = sorted({task.kind for task in picture.tasks}, key=lambda kind: (order.get(kind, 99), kind))
    return [*((kinds.work_class(kind), kinds.words(kind)) for kind in found), (f"k-{WAIT}", "compute waits")]


def _marks(tasks: Sequence[StepTask], stream: str, seconds: float) -> list[Mark]:
    marks: list[Mark] = []
    end = 0.0
    for task in tasks:
        if task.stream != stream:
            continue
        if stream == COMPUTE and task.start > end:
            marks.append(_wait(end, task.start))
        end = task.end
        length = task.end - task.start
        marks.append(Mark(task.kind, (task.kind,), task.block, task.name, 1, task.start, task.end, length))
    if stream == COMPUTE and seconds > end:
        marks.append(_wait(end, seconds))
    return marks


def _wait(start: float, end: float) -> Mark:
    return Mark(WAIT, (WAIT,), "", "", 1, start, end, end - start)


def _busy(tasks: Sequence[StepTask], stream: str) -> float:
    whole = max((task.end for task in tasks), default=0.0)
    return sum(task.end - task.start for task in tasks if task.stream == stream) / whole if whole else 0.0


def _mark(mark: Mark, seconds: float, y: float) -> Markup:
    style = "k-wait" if mark.kind == WAIT else kinds.work_class(mark.kind)
    told = svg.tag("title", mark_words(mark))
    size = svg.share((mark.end - mark.start) / seconds)
    return svg.rect(svg.share(mark.start / seconds), y, size, LANE, told, class_=style)


def mark_words(mark: Mark) -> str:
    """all-gather gather0, text: 5,488 us, from 2,071,322 us."""
    names = ", ".join("compute waits" if kind == WAIT else kinds.words(kind) for kind in mark.kinds)
    if mark.count > 1:
        names = f"{plural(mark.count, 'task')} ({names})"
    elif mark.name:
        names = f"{names} {mark.name}"
    block = f", {mark.block}" if mark.block else ""
    return f"{names}{block}: {_microseconds(mark.end - mark.start)}, from {_microseconds(mark.start)}"


def _microseconds(seconds: float) -> str:
    value = seconds * 1e6
    return f"{value:,.0f} us" if value >= 100 else f"{value:,.1f} us"


def _stretch(stretch: Stretch, seconds: float) -> Markup:
    """A phase with its words, which are cut at its end."""
    words = f"{stretch.block} {stretch.phase}".strip()
    told = svg.tag(
        "title", f"{words}: {_microseconds(stretch.end - stretch.start)}, from {_microseconds(stretch.start)}"
    )
    style = {"forward": "forward", "backward": "backward"}.get(stretch.phase, "update")
    inner = svg.rect(0, 0, "100%", RIBBON, told, class_=f"phase {style}"), svg.text(6, 15, words, class_="small")
    size = svg.share((stretch.end - stretch.start) / seconds)
    return svg.tag("svg", *inner, x=svg.share(stretch.start / seconds), y=RIBBON_TOP, width=size, height=RIBBON)


def _ticks(seconds: float, zoom: int) -> Markup:
    step = nice_step(seconds / (TICKS * zoom))
    count = int(seconds / step + 1e-9)
    body: list[str] = []
    for number in range(count + 1):
        at = number * step
        if at > seconds * (1 - 0.6 / (TICKS * zoom)):
            break
        x, odd = svg.share(at / seconds), "odd" if number % 2 else None
        body.append(svg.line(x, 16, x, HEIGHT, class_=odd))
        body.append(svg.text(x, 11, axis_text(at, step), class_=odd, text_anchor="middle" if number else "start"))
    return svg.group(*body, class_=f"ticks t{zoom}")


def axis_text(seconds: float, step: float) -> str:
    """A place on the time axis, to the precision of its ticks: 2.5 s, 350 ms, 20 us."""
    if not seconds:
        return "0"
    scale, unit = (1.0, "s") if step >= 0.05 else (1e3, "ms") if step >= 0.5e-4 else (1e6, "us")
    return f"{tick_text(seconds * scale, step * scale)} {unit}"
