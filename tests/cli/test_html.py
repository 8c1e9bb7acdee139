"""`--html`: the page beside the report, and one line for a page that cannot be written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.cli.test_simulate import CONFIG


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def test_plan_writes_a_page(run: Run, model: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    outcome = run("plan", model, "--gpus", "8", "--seq-len", "4096", "--html", str(page))
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.endswith(f"page saved as {page}\n")
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and "planned anew at every size" in text
    assert f"omnicompile plan {model} --gpus 8 --seq-len 4096 --html {page}" in text
    speed = next(line for line in outcome.out.splitlines() if "tokens/s/GPU" in line).split()[1]
    assert f">{speed} <" in text
    assert list(tmp_path.iterdir()) == [page]


def test_json_stays_json(run: Run, model: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    outcome = run("plan", model, "--gpus", "8", "--seq-len", "4096", "--json", "--html", str(page))
    assert json.loads(outcome.out)["plan"] and page.exists()


def test_simulate_writes_a_page_of_its_layout(run: Run, model: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    outcome = run("simulate", model, "--gpus", "8", "--layout", "sp=2", "--html", str(page))
    assert outcome.code == 0 and f"page saved as {page}" in outcome.out
    text = page.read_text(encoding="utf-8")
    assert "Priced layout" in text and "planned anew" not in text and "all-to-all" in text


@pytest.mark.parametrize("command", ["plan", "simulate"])
@pytest.mark.parametrize(
    ("path", "words"), [("missing/page.html", "directory TMP/missing does not exist"), (".", "is a directory")]
)
def test_a_page_that_cannot_be_written_is_one_line(
    run: Run, model: str, tmp_path: Path, command: str, path: str, words: str
) -> None:
    outcome = run(command, model, "--gpus", "8", "--html", f"{tmp_path}/{path}")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: --html ") and outcome.err.count("\n") == 1
    assert words.replace("TMP", str(tmp_path)) in outcome.err


def test_a_page_is_written_whole_or_not_at_all(
    run: Run, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.html"
    page.write_text("before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    outcome = run("simulate", model, "--gpus", "8", "--no-cache", "--html", str(page))
    assert outcome.code == 2
    assert outcome.err == f"error: --html {page}: cannot be written: No space left on device\n"
    assert page.read_text() == "before" and list(tmp_path.iterdir()) == [page]


def test_plan_writes_a_timeline(run: Run, model: str, tmp_path: Path) -> None:
    trace = tmp_path / "step.json"
    outcome = run("plan", model, "--gpus", "8", "--seq-len", "4096", "--trace", str(trace))
    assert outcome.code == 0 and f"saved as {trace}: open it in ui.perfetto.dev" in outcome.out
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"compute", "optimizer"} <= names
    outcome = run("plan", model, "--gpus", "8", "--trace", f"{tmp_path}/missing/step.json")
    assert outcome.code == 2 and "directory" in outcome.err and outcome.err.count("\n") == 1
