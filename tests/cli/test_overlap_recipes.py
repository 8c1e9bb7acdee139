"""A plan's section `overlap`: saved, edited, loaded, compared, planned again, and what is wrong in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omnicompile.plan import Overlap
from omnicompile.recipe import dumps, load_pins, load_recipe

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 1024,
    "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8,
}  # fmt: skip
CLUSTER = ("--gpus", "8", "--seq-len", "8192")
EXCHANGES = ("--pin", "mesh.sp=2", "--pin", "overlap.head_groups=2")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


@pytest.fixture
def saved(run: Callable[..., Any], config: str, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    outcome = run("plan", config, *CLUSTER, *EXCHANGES, "--out", str(path))
    assert outcome.code == 0, outcome
    return path


def test_what_is_pinned_is_saved_and_planned_again(run: Callable[..., Any], config: str, saved: Path) -> None:
    plan = load_recipe(saved)
    assert (plan.overlap.head_groups, plan.overlap.exchanges) == (2, True)
    assert "overlap: {head_groups: 2" in saved.read_text()
    assert load_pins(saved)["overlap.head_groups"] == "2"
    again = saved.with_name("again.yaml")
    outcome = run("plan", config, "--recipe", str(saved), "--out", str(again))
    assert outcome.code == 0 and "attention in 2 groups of heads" in " ".join(outcome.out.split())
    assert load_recipe(again).overlap == plan.overlap and load_recipe(again).mesh == plan.mesh


def test_what_is_edited_is_compared_and_kept(run: Callable[..., Any], config: str, saved: Path) -> None:
    edited = saved.with_name("edited.yaml")
    text = saved.read_text()
    assert "head_groups: 2" in text
    edited.write_text(text.replace("head_groups: 2", "head_groups: 4, prefetch: 2"))
    before, after = (set(path.read_text().splitlines()) for path in (saved, edited))
    assert len(before - after) == len(after - before) == 1  # one line in a diff
    plan = load_recipe(edited)
    assert (plan.overlap.head_groups, plan.overlap.prefetch) == (4, 2) and load_recipe(edited) == plan
    edited.write_text(dumps(plan))
    assert load_recipe(edited) == plan
    outcome = run("compare", str(saved), str(edited))
    assert outcome.code == 0 and "overlap.head_groups=4" in outcome.out and "overlap.prefetch=2" in outcome.out
    again = saved.with_name("again.yaml")
    assert run("plan", config, "--recipe", str(edited), "--out", str(again)).code == 0
    assert (load_recipe(again).overlap.head_groups, load_recipe(again).overlap.prefetch) == (4, 2)


def test_a_pin_goes_before_the_recipe(run: Callable[..., Any], config: str, saved: Path) -> None:
    again = saved.with_name("again.yaml")
    outcome = run("plan", config, "--recipe", str(saved), "--pin", "head_groups=1", "--out", str(again))
    assert outcome.code == 0 and load_recipe(again).overlap.head_groups == 1


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("{head_group: 2}", "overlap.head_group: unknown key 'head_group' (did you mean head_groups?)"),
        ("{head_groups: 0}", "overlap.head_groups: must be at least 1, got 0"),
        ("{prefetch: -1}", "overlap.prefetch: must be at least 1, got -1"),
        ("{expert_chunks: many}", "overlap.expert_chunks: must be a whole number, got 'many'"),
        ("{exchanges: 1}", "overlap.exchanges: must be true or false, got 1"),
        ("[1]", "overlap: must be a mapping of keys to values, got a list"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "compare"])
def test_what_is_wrong_is_one_line(
    run: Callable[..., Any], config: str, saved: Path, command: str, section: str, said: str
) -> None:
    lines = saved.read_text().splitlines()
    (number,) = (i for i, line in enumerate(lines) if line.startswith("overlap:"))
    lines[number] = f"overlap: {section}"
    saved.write_text("\n".join(lines) + "\n")
    arguments = ("plan", config, "--recipe", str(saved)) if command == "plan" else ("compare", str(saved), str(saved))
    outcome = run(*arguments)
    assert outcome.code == 2 and outcome.err == f"error: {saved}:{number + 1}: {said}\n", outcome


@pytest.mark.parametrize(
    ("pins", "said"),
    [
        (("mesh.sp=2", "overlap.head_groups=3"), "no rank's heads can be cut into 3 equal groups"),
        (("mesh.sp=1", "overlap.head_groups=2"), "heads are not exchanged (sp=1)"),
        (("overlap.expert_chunks=2",), "rows of experts are not exchanged (ep=1)"),
        (("overlap.expert_chunks=0",), "must be at least 1"),
        (("overlap.chunks=2",), "overlap has no choice 'chunks'"),
    ],
)
def test_pins_that_cannot_be(run: Callable[..., Any], config: str, pins: tuple[str, ...], said: str) -> None:
    outcome = run("plan", config, *CLUSTER, *(word for pin in pins for word in ("--pin", pin)))
    assert outcome.code == 2 and said in outcome.err and outcome.err.count("\n") == 1, outcome


def test_a_plan_of_defaults_has_no_section(run: Callable[..., Any], config: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    pins = [f"overlap.{name}={str(value).lower()}" for name, value in vars(Overlap()).items()]
    outcome = run("plan", config, *CLUSTER, *(word for pin in pins for word in ("--pin", pin)), "--out", str(path))
    assert outcome.code == 0, outcome
    assert load_recipe(path).overlap == Overlap() and "overlap:" not in path.read_text()
