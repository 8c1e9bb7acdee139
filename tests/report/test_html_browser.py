"""The page as a browser shows it: silent, on its own, laid out at any width, and alive."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from omnicompile.report.html.page import Page, page_html
from tests.report.chromium import PROGRAM, Browser, browser

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs Chromium (apt-get install chromium)")

LAID_OUT = ("#figures li", "svg.bars", "svg.lanes", "svg.chart", "table", ".lane-names span", "#command", ".k-compute")

OUTSIDE = """
[...document.querySelectorAll("svg.diagram text, svg.chart text, svg.bars text")].filter((text) => {
  const box = text.getBoundingClientRect(), frame = text.closest("svg").getBoundingClientRect();
  return box.width && (box.right > frame.right + 2 || box.left < frame.left - 2 || box.bottom > frame.bottom + 3);
}).map((text) => text.textContent)
"""

OVERLAPPING = """
[...document.querySelectorAll("svg.diagram, svg.chart")].flatMap((svg) => {
  const boxes = [...svg.querySelectorAll("text")].map((text) => [text.textContent, text.getBoundingClientRect()]);
  return boxes.flatMap(([words, a], i) => boxes.slice(i + 1).filter(([_, b]) =>
    a.width && b.width && a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 4 && b.top < a.bottom - 4)
    .map(([other]) => `${words} / ${other}`));
})
"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with ExitStack() as stack:
        try:
            found = stack.enter_context(browser(tmp_path_factory.mktemp("profile")))
        except TimeoutError as error:  # such as a stub that would install the browser
            pytest.skip(f"Chromium does not start: {error}")
        yield found


@pytest.fixture(scope="module")
def file(page: Page, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(page_html(page), encoding="utf-8")
    return path


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_it_is_laid_out_in_silence_and_alone(chromium: Browser, file: Path, width: int, dark: bool) -> None:
    chromium.errors.clear()
    chromium.requests.clear()
    chromium.open(file, width, dark=dark)
    assert chromium.errors == []
    assert [address for address in chromium.requests if not address.startswith("data:")] == [file.as_uri()]
    assert chromium.value("document.documentElement.scrollWidth") <= width
    for selector in LAID_OUT:
        boxes = f"[...document.querySelectorAll('{selector}')].filter((e) => !e.closest('details'))"
        sizes = f"{boxes}.map((e) => e.getBoundingClientRect()).map((b) => Math.min(b.width, b.height))"
        assert max(chromium.value(sizes), default=0) > 0, selector
    shown = chromium.value("[...document.querySelectorAll('svg.diagram')].map((e) => e.getBoundingClientRect().width)")
    assert sum(size > 0 for size in shown) == 1
    assert chromium.value(OUTSIDE) == []
    assert chromium.value(OVERLAPPING) == []


def test_the_timeline_zooms_and_tells(chromium: Browser, file: Path) -> None:
    chromium.open(file, 1280)
    width = "document.querySelector('svg.lanes').getBoundingClientRect().width"
    before = chromium.value(width)
    chromium.value("document.querySelector('[data-zoom=in]').click()")
    assert chromium.value(width) == pytest.approx(2 * before, rel=0.01)
    assert chromium.value("document.documentElement.scrollWidth") <= 1280
    chromium.value("document.querySelector('[data-zoom=all]').click()")
    assert chromium.value(width) == pytest.approx(before, rel=0.01)
    chromium.value(
        "document.querySelector('svg.lanes rect.k-compute')"
        ".dispatchEvent(new PointerEvent('pointermove', {bubbles: true, clientX: 300, clientY: 300}))"
    )
    assert " us" in chromium.value("document.getElementById('tip').textContent")
    assert not chromium.value("document.getElementById('tip').hidden")


def test_long_names_do_not_break_it(chromium: Browser, page: Page, tmp_path: Path) -> None:
    long = "model_" * 30
    path = tmp_path / "long.html"
    plan = replace(page.plans[0], model=f"{long}/{long}.py", notes=(long,))
    program = replace(page.program, name=long)
    path.write_text(
        page_html(replace(page, plans=[plan], program=program, reasons=[""], command=long)), encoding="utf-8"
    )
    chromium.open(path, 390)
    assert chromium.value("document.documentElement.scrollWidth") <= 390
