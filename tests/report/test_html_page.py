"""The page of a plan: whole, well-formed, harmless, and in the numbers of the terminal."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from omnicompile.picture import Curve, Point
from omnicompile.plan import Plan, Prediction
from omnicompile.program import Program
from omnicompile.recipe import loads
from omnicompile.report import figures
from omnicompile.report.html.page import Page, page_html
from omnicompile.report.terminal import plan_text
from omnicompile.report.units import digits, gib, percent, seconds_text

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "</script><script>alert(1)</script>\"'&\x00<b>"


class Reader(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def drawings(text: str) -> dict[str, ElementTree.Element]:
    """The outer SVGs by the key in the ids of their titles; parsing them checks that they are well-formed."""
    found: dict[str, ElementTree.Element] = {}
    depth, start = 0, 0
    for match in re.finditer(r"<svg\b[^>]*>|</svg>", text):
        if match.group() == "</svg>":
            depth -= 1
            if not depth:
                root = ElementTree.fromstring(text[start : match.end()])
                found[str(root.get("aria-labelledby")).split("-title")[0]] = root
        else:
            start = match.start() if not depth else start
            depth += 1
    return found


def words(root: ElementTree.Element) -> str:
    return " ".join("".join(node.itertext()) for node in root.iter(f"{SVG}text"))


def priced(page: Page) -> Prediction:
    prediction = page.plans[0].prediction
    assert prediction is not None
    return prediction


@pytest.fixture(scope="module")
def html(page: Page) -> str:
    return page_html(page)


def test_drawings_are_well_formed_and_say_what_they_show(html: str) -> None:
    found = drawings(html)
    assert set(found) >= {"blocks-wide", "blocks-tall", "memory", "step", "timeline"}
    assert {"throughput-seq-len", "memory-seq-len", "throughput-gpus", "memory-gpus"} <= set(found)
    for root in found.values():
        title, description = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
        assert title is not None and title.text
        assert description is not None and description.text and len(description.text) > 20
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_nothing_is_asked_of_a_network(html: str) -> None:
    reader = Reader(html)
    assert not {name for name, _ in reader.tags} & {"img", "iframe", "object", "embed", "base", "form"}
    addresses = [value for _, attrs in reader.tags for key, value in attrs.items() if key in ("src", "href")]
    assert addresses == ["data:,"]
    assert not re.findall(r"@import|url\(|\bfetch\(|XMLHttpRequest|https?://(?!www\.w3\.org/2000/svg)", html)
    assert "default-src 'none'" in html


def test_every_block_and_its_choices_are_in_the_diagram(page: Page, html: str) -> None:
    for key in ("blocks-wide", "blocks-tall"):
        said = words(drawings(html)[key])
        for name, block in page.plans[0].blocks.items():
            assert name in said and figures.sharding_words(block) in said and block.recompute.value in said
            assert gib(priced(page).block_memory[name]) in said
            assert seconds_text(priced(page).block_time[name]) in said
        for transfer in page.picture.transfers:
            assert seconds_text(transfer.seconds) in said
        assert "16.0 MiB" not in said or page.picture.flows[0].nbytes == 16 * 2**20


def test_memory_by_kind_and_block(page: Page, html: str) -> None:
    said = Reader(html).text
    for kind, value in priced(page).memory.items():
        if value > 0:
            assert kind in said and gib(value) in said
    bars = drawings(html)["memory"]
    titles = [node.text or "" for node in bars.iter(f"{SVG}title")]
    for name, memory in page.picture.memory.items():
        assert name in words(bars) and gib(sum(memory.values())) in words(bars)
    for kind, value in priced(page).memory.items():
        assert value <= 0 or f"{kind}: {gib(value)}" in titles


def test_the_numbers_are_those_of_the_terminal(page: Page, html: str) -> None:
    prediction, said = priced(page), " ".join(Reader(html).text.split())
    report = plan_text(page.plans[0], page.program, page.plans[1:], page.reasons[1:], width=120)
    for number in (
        digits(prediction.tokens_per_second_per_gpu),
        seconds_text(prediction.step_seconds),
        percent(prediction.mfu),
        percent(prediction.mfu_paper),
        gib(prediction.memory_total),
        digits(figures.cost_per_billion_tokens(page.plans[0]) or 0.0),
        figures.sample_words(page.plans[0], page.program),
        figures.step_words(page.plans[0]),
        figures.rank_words(page.plans[0].mesh),
        *(seconds_text(value) for value in prediction.time.values() if value),
    ):
        assert number in said and number in report
    for plan, reason in zip(page.plans[1:], page.reasons[1:]):
        assert reason in said and figures.slower_words(plan, page.plans[0]) in said


def test_notes_and_how_to_reproduce(page: Page, html: str) -> None:
    said = Reader(html).text
    assert all(note in said for note in page.plans[0].notes)
    assert page.command in said and page.made in said and page.searched in said
    start = said.index("omnicompile_recipe: 1")
    recipe = said[start : said.index("Made by a test")]
    assert loads(recipe.strip() + "\n") == page.plans[0]


def renamed(program: Program, name: str) -> Program:
    """With `name` for the program and for its first block."""
    old = program.blocks[0].name
    return replace(
        program,
        name=name,
        blocks=tuple(replace(b, name=name) if b.name == old else b for b in program.blocks),
        segments=tuple(replace(s, block=name) if s.block == old else s for s in program.segments),
    )


def renamed_plan(plan: Plan, old: str, name: str) -> Plan:
    prediction = plan.prediction
    assert prediction is not None
    told = {key: {name if block == old else block: value for block, value in getattr(prediction, key).items()}
            for key in ("block_memory", "block_time")}  # fmt: skip
    blocks = {name if block == old else block: value for block, value in plan.blocks.items()}
    return replace(plan, model=name, blocks=blocks, prediction=replace(prediction, **told), notes=(name,))


def test_hostile_names_are_only_text(page: Page) -> None:
    old = page.program.blocks[0].name

    def new(block: str) -> str:
        return HOSTILE if block == old else block

    picture = replace(
        page.picture,
        transfers=tuple(replace(t, block=new(t.block)) for t in page.picture.transfers),
        flows=tuple(replace(f, source=new(f.source), target=new(f.target)) for f in page.picture.flows),
        memory={new(block): memory for block, memory in page.picture.memory.items()},
        tasks=tuple(replace(t, block=new(t.block), name=HOSTILE) for t in page.picture.tasks),
        stretches=tuple(replace(s, block=new(s.block)) for s in page.picture.stretches),
    )
    plans = [renamed_plan(plan, old, HOSTILE) for plan in page.plans]
    program = replace(renamed(page.program, HOSTILE), edges=())
    text = page_html(
        replace(
            page, plans=plans, program=program, picture=picture, command=HOSTILE, made=HOSTILE, reasons=[HOSTILE] * 3
        )
    )
    reader = Reader(text)
    assert reader.count("script") == 1 and reader.count("b") == 0
    assert len(drawings(text)) == len(drawings(page_html(page)))
    assert "\x00" not in text and "alert(1)" in reader.text


def test_a_plan_that_does_not_fit_says_so(page: Page) -> None:
    prediction = replace(priced(page), memory_capacity=20 * 2**30)
    plan = replace(page.plans[0], prediction=prediction)
    text = page_html(replace(page, plans=[plan], reasons=[""]))
    over = gib(prediction.memory_total - prediction.memory_capacity)
    assert f"{over} too much for the 20.0 GiB of a GPU" in Reader(text).text
    assert "capacity 20.0 GiB" in words(drawings(text)["memory"])


def test_points_that_do_not_fit_are_drawn_as_such(page: Page) -> None:
    small = replace(page.plans[0], prediction=replace(priced(page), memory_capacity=20 * 2**30))
    points = (
        Point(1024, None, "the images do not fit"),
        Point(2048, small, "does not fit"),
        Point(4096, page.plans[0]),
    )
    curve = Curve("seq_len", 4096, points, ())
    text = page_html(replace(page, curves=[curve]))
    found = drawings(text)
    assert "no fit" in words(found["throughput-seq-len"]) and "no plan" in words(found["memory-seq-len"])
    assert len(found["throughput-seq-len"].findall(f".//{SVG}circle")) == 1
    assert "the images do not fit" in Reader(text).text


def test_the_page_of_a_layout_has_no_search_in_it(page: Page) -> None:
    curves = [replace(curve, planned=()) for curve in page.curves]
    text = page_html(replace(page, plans=page.plans[:1], reasons=[""], curves=curves, searched=""))
    said = Reader(text).text
    assert "Priced layout" in said and "Next best" not in said and "planned anew" not in said


def test_a_plan_that_is_not_priced_has_no_page(page: Page) -> None:
    with pytest.raises(ValueError, match="not priced"):
        page_html(replace(page, plans=[replace(page.plans[0], prediction=None)]))
