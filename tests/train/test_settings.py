"""Training options from files and the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from omnicompile.errors import InputError, RecipeError
from omnicompile.plan import Plan
from omnicompile.recipe import dumps, load_recipe
from omnicompile.train.options import OptimizerKind, ScheduleKind
from omnicompile.train.settings import load_options, parse_sets


@pytest.fixture
def recipe(tmp_path: Path, sample_plans: list[Plan]) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(dumps(replace(sample_plans[0], prediction=None)))
    return path


def with_section(recipe: Path, text: str) -> Path:
    recipe.write_text(recipe.read_text() + text)
    return recipe


def test_a_recipe_with_training_options_is_the_same_plan(recipe: Path) -> None:
    before = load_recipe(recipe)
    assert load_recipe(with_section(recipe, "train: {steps: 10}\n")) == before
    assert load_options(recipe).steps == 10


def test_own_file_and_command_line_override_key_by_key(recipe: Path, tmp_path: Path) -> None:
    with_section(recipe, "train:\n  steps: 10\n  optimizer: {lr: 1e-3, name: muon}\n  schedule: {kind: cosine}\n")
    own = tmp_path / "train.yaml"
    own.write_text("train:\n  steps: 20\n  optimizer: {lr: 2e-3}\n")
    options = load_options(recipe, own, ["optimizer.weight_decay=0", "freeze=[model.visual]"])
    assert options.steps == 20 and options.schedule.kind is ScheduleKind.COSINE
    assert options.optimizer.name is OptimizerKind.MUON and options.optimizer.lr == 2e-3
    assert options.optimizer.weight_decay == 0 and options.freeze == ("model.visual",)


def test_what_a_part_lacks_another_may_give(recipe: Path) -> None:
    with_section(recipe, "train: {schedule: {kind: linear}}\n")
    assert load_options(recipe, sets=["steps=5"]).steps == 5
    with pytest.raises(InputError, match="needs `steps`"):
        load_options(recipe)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {step: 3}\n", r"recipe.yaml:\d+: train.step: unknown key 'step' \(did you mean steps\?\)"),
        ("train:\n  optimizer: {lr: fast}\n", r"recipe.yaml:\d+: train.optimizer.lr: must be a number, got 'fast'"),
        ("train: 3\n", r"train: must be a mapping"),
        ("train: {optimizer: {name: sgd}}\n", "must be one of adamw, muon"),
    ],
)
def test_a_mistake_is_named_with_its_line(recipe: Path, text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_options(with_section(recipe, text))


def test_mistakes_in_own_file_and_sets(recipe: Path, tmp_path: Path) -> None:
    own = tmp_path / "train.yaml"
    own.write_text("steps: 3\n")
    with pytest.raises(RecipeError, match="unknown key 'steps'"):
        load_options(recipe, own)
    with pytest.raises(RecipeError, match="does not exist"):
        load_options(recipe, tmp_path / "none.yaml")
    for item, said in (("steps", "option=value"), ("lr=1", "--set: lr: unknown key"), ("steps=x", "whole number")):
        with pytest.raises((InputError, RecipeError), match=said):
            load_options(recipe, sets=[item])


def test_sets_nest() -> None:
    assert parse_sets(["a.b=1", "a.c=[x, y]", "d=null"]) == {"a": {"b": 1, "c": ["x", "y"]}, "d": None}
