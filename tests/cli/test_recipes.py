"""`omnicompile recipes`: list, show, copy; one line for every bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omnicompile.recipe import load_recipe
from omnicompile.recipes import find, recipes

NAME = "qwen2-vl-7b-8xh100-32k"


def test_the_list_names_every_recipe_and_its_figures(run: Any) -> None:
    outcome = run("recipes")
    assert (outcome.code, outcome.err) == (0, "")
    for recipe in recipes():
        prediction = recipe.load().prediction
        assert prediction is not None
        line = next(line for line in outcome.out.splitlines() if line.startswith(f"{recipe.name} "))
        assert f"{prediction.tokens_per_second_per_gpu:,.0f}" in line
        assert f"{prediction.memory_total / 2**30:.1f}" in line


def test_the_list_for_programs(run: Any) -> None:
    entries = json.loads(run("recipes", "--json").out)
    assert [entry["name"] for entry in entries] == [recipe.name for recipe in recipes()]
    entry = next(entry for entry in entries if entry["name"] == NAME)
    plan = find(NAME).load()
    assert plan.prediction is not None
    assert entry["tokens_per_second_per_gpu"] == plan.prediction.tokens_per_second_per_gpu
    assert (entry["gpus"], entry["seq_len"], entry["mesh"]["sp"]) == (8, 32768, plan.mesh.sp)


def test_show_prints_the_file(run: Any, tmp_path: Path) -> None:
    outcome = run("recipes", "show", NAME)
    assert outcome.code == 0
    (tmp_path / "shown.yaml").write_text(outcome.out)
    assert load_recipe(tmp_path / "shown.yaml") == find(NAME).load()


def test_show_for_programs(run: Any) -> None:
    view = json.loads(run("recipes", "show", NAME, "--json").out)
    assert (view["name"], view["ranks"], view["workload"]["seq_len"]) == (NAME, 8, 32768)


def test_copy_to_a_file_and_to_a_directory(run: Any, tmp_path: Path) -> None:
    assert run("recipes", "copy", NAME, str(tmp_path / "mine.yaml")).code == 0
    assert run("recipes", "copy", NAME, str(tmp_path)).code == 0
    assert load_recipe(tmp_path / "mine.yaml") == load_recipe(tmp_path / f"{NAME}.yaml") == find(NAME).load()


def test_copy_overwrites_nothing(run: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("mine")
    outcome = run("recipes", "copy", NAME, str(tmp_path / "mine.yaml"))
    assert outcome.code == 2 and "exists" in outcome.err
    assert (tmp_path / "mine.yaml").read_text() == "mine"


def test_bad_input_is_one_line(run: Any, tmp_path: Path) -> None:
    for arguments, said in (
        (("show", "qwen2-vl-7b-8xh100-32"), f"did you mean {NAME}?"),
        (("show", "zzz"), "all: omnicompile recipes"),
        (("copy", "zzz", str(tmp_path)), "the zoo has no recipe 'zzz'"),
        (("copy", NAME, str(tmp_path / "no" / "such.yaml")), "does not exist"),
        (("show",), "NAME"),
        (("print", NAME), "invalid choice"),
        (("--json", "copy", NAME, str(tmp_path / "x.yaml")), "--json goes with"),
    ):
        outcome = run("recipes", *arguments)
        assert outcome.code == 2, arguments
        assert outcome.out == "" and outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, arguments
        assert said in outcome.err, (arguments, outcome.err)
