"""The parts that pages are drawn from: SVG text, stacked bars, the diagram's layout, the timeline, the curves."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from omnicompile.cost_model.schedule import STREAMS
from omnicompile.picture import Flow, Picture, StepTask
from omnicompile.program import Edge
from omnicompile.report.html import diagram, kinds, svg, timeline
from omnicompile.report.html.bars import Bar, Part, bars
from omnicompile.report.html.page import Page
from omnicompile.report.html.ticks import nice_step, tick_text

SVG = "{http://www.w3.org/2000/svg}"


def test_elements_are_escaped_and_numbers_short() -> None:
    text = svg.tag("a", "<&>\x07", svg.tag("b"), class_='"x"', font_size=1.0, y=1 / 3, gone=None)
    assert text == '<a class="&#34;x&#34;" font-size="1" y="0.33">&lt;&amp;&gt;\ufffd<b/></a>'
    assert ElementTree.fromstring(text).get("class") == '"x"'
    assert [svg.number(value) for value in (0.0, -0.001, 10.0, 2.504)] == ["0", "0", "10", "2.5"]
    assert [svg.share(value) for value in (0.0, 1.0, 1 / 3)] == ["0%", "100%", "33.333%"]


def test_text_is_cut_to_a_width() -> None:
    assert svg.fit("vision", 100, 12) == "vision"
    cut = svg.fit("a_block_with_a_very_long_name", 80, 12)
    assert cut.endswith("…") and svg.text_width(cut, 12) <= 80
    assert svg.fit("wide", 1, 12) == "…"
    assert svg.first_fit(("much too long to stand here", "short"), 60, 12) == "short"


@pytest.mark.parametrize(("rough", "step"), [(0.9, 1.0), (1.0, 1.0), (1.1, 2.0), (3.0, 5.0), (7e-4, 1e-3), (600, 1000)])
def test_ticks_are_round(rough: float, step: float) -> None:
    assert nice_step(rough) == pytest.approx(step)


def test_ticks_say_as_much_as_they_need() -> None:
    assert [tick_text(2.5, 0.5), tick_text(2500, 500), tick_text(0.02, 0.01)] == ["2.5", "2,500", "0.02"]
    assert [timeline.axis_text(*pair) for pair in ((0.0, 1.0), (3.475, 0.025), (2.5, 0.5), (2e-5, 1e-5))] == [
        "0", "3,475 ms", "2.5 s", "20 us",
    ]  # fmt: skip


def test_parts_of_a_bar_stand_side_by_side_and_are_labelled_where_there_is_room() -> None:
    parts = (Part("activations", "m-activations", 30.0, "30 GiB"), Part("context", "m-context", 1.0, "1 GiB"))
    root = ElementTree.fromstring(bars("k", "t", "d", [Bar("whole", "31 GiB", parts, 80.0)], 80.0, 60.0, "limit"))
    first, second = (node for node in root.iter(f"{SVG}rect") if "part" in node.get("class", ""))
    assert (first.get("x"), first.get("width"), second.get("x")) == ("0%", "37.5%", "37.5%")
    said = ["".join(node.itertext()) for node in root.iter(f"{SVG}text")]
    assert "activations" in said and "context" not in said and "limit" in said


def test_every_kind_has_a_colour() -> None:
    from importlib.resources import files

    sheet = files("omnicompile.report.html").joinpath("page.css").read_text()
    for style in [*map(kinds.memory_class, kinds.MEMORY), *map(kinds.work_class, kinds.WORK), "m-other", "k-other"]:
        assert f".{style}," in sheet or f".{style} {{" in sheet
    assert kinds.work_class("hidden all_gather") == kinds.work_class("all_gather") == "k-all-gather"
    assert (kinds.work_class("dance"), kinds.memory_class("attic")) == ("k-other", "m-other")


def cards(names: str) -> list[diagram.Card]:
    return [diagram.Card(name, "encoder", "1 M parameters", (("sp", "-"),), (), 0.0) for name in names]


@pytest.mark.parametrize(
    ("names", "flows"),
    [("t", ""), ("vt", "vt"), ("avt", "at vt"), ("avtd", "at vt td"), ("vtd", "vt vd td"), ("vt", "vt tv tt")],
)
def test_diagrams_of_any_shape(names: str, flows: str) -> None:
    """No card covers another, and every flow has its arrow and its bytes."""
    found = [Flow(pair[0], pair[1], 2.0**20) for pair in flows.split()]
    seen = sum(flow.source != flow.target for flow in found)
    root = ElementTree.fromstring(diagram.tall_diagram(cards(names), found))
    boxes = [
        tuple(float(node.get(key, "0")) for key in ("x", "y", "width", "height"))
        for node in root.iter(f"{SVG}rect")
        if node.get("class") == "card"
    ]
    assert len(boxes) == len(names)
    assert all(upper[1] + upper[3] < lower[1] for upper, lower in pairwise(boxes))
    assert sum(node.get("class") == "arrow" for node in root.iter(f"{SVG}path")) == seen
    assert sum("1.00 MiB" in "".join(node.itertext()) for node in root.iter(f"{SVG}text")) == seen


def test_an_encoder_stands_beside_what_reads_it(page: Page) -> None:
    found = diagram.cards(page.plans[0], page.program, page.picture)
    root = ElementTree.fromstring(diagram.wide_diagram(page.program, found, page.picture.flows))
    boxes = [node for node in root.iter(f"{SVG}rect") if node.get("class") == "card"]
    left, right = (float(box.get("x", "0")) for box in boxes)
    assert left < right and diagram.is_wide(page.program)


def test_blocks_stand_one_below_the_other_where_a_flow_would_cross_a_card(page: Page) -> None:
    blocks = [replace(page.program.blocks[0], name=name) for name in "vtd"]
    for pairs, wide in (("vt td", True), ("vt td vd", False), ("vt tv", False), ("", True)):
        edges = tuple(Edge(pair[0], pair[1], page.program.edges[0].nbytes) for pair in pairs.split())
        assert diagram.is_wide(replace(page.program, blocks=tuple(blocks), edges=edges)) is wide
    four = tuple(replace(blocks[0], name=name) for name in "abcd")
    assert not diagram.is_wide(
        replace(
            page.program, blocks=four, edges=tuple(Edge(*p, page.program.edges[0].nbytes) for p in ("ab", "bc", "cd"))
        )
    )


def test_a_timeline_shows_every_second_of_every_stream(page: Page) -> None:
    lanes = timeline.lanes(page.picture)
    for stream in STREAMS:
        tasks = [task for task in page.picture.tasks if task.stream == stream]
        assert sum(mark.count for mark in lanes[stream]) >= len(tasks)
        assert all(before.end <= after.start for before, after in pairwise(lanes[stream]))
        if tasks and stream != "compute":
            assert (lanes[stream][0].start, lanes[stream][-1].end) == (tasks[0].start, tasks[-1].end)
    assert lanes["compute"][0].start == 0.0 and lanes["compute"][-1].end == page.picture.seconds


def many_tasks(count: int) -> Picture:
    """Alternating kinds of a microsecond each, with one long task among them."""
    tasks = [
        StepTask(f"work{n}", "compute", ("compute", "recompute")[n % 2], "text", n * 1e-6, (n + 1) * 1e-6)
        for n in range(count)
    ]
    long = StepTask("work", "compute", "optimizer", "text", count * 1e-6, 1.0)
    return Picture((), (), {}, (*tasks, long), (), 1.0)


def test_a_long_timeline_stays_light() -> None:
    picture = many_tasks(100_000)
    marks = timeline.lanes(picture)["compute"]
    assert len(marks) <= timeline.MOST_MARKS
    assert sum(mark.count for mark in marks) == 100_001
    assert marks[-1].kind == "optimizer" and marks[-1].end == 1.0
    assert len(timeline.timeline(picture)) < 600_000
    assert "tasks (compute, recompute), text" in timeline.mark_words(marks[0])


def test_what_a_task_says() -> None:
    mark = timeline.Mark("all_gather", ("all_gather",), "text", "gather0", 1, 2.0, 2.005488, 0.005488)
    assert timeline.mark_words(mark) == "all-gather gather0, text: 5,488 us, from 2,000,000 us"
    short = replace(mark, end=2.0000123, kind=timeline.WAIT, kinds=(timeline.WAIT,), block="", name="")
    assert timeline.mark_words(short) == "compute waits: 12.3 us, from 2,000,000 us"
