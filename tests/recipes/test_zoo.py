"""The recipe zoo: every recipe loads, is what models.yaml asks for, and is what the planner says now."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from omnicompile.capture.source import load_model_source
from omnicompile.errors import InputError, RecipeError
from omnicompile.planner.api import plan_source
from omnicompile.recipe import dumps, load_pins, load_recipe
from omnicompile.recipes import DIRECTORY, Recipe, find, recipes
from omnicompile.recipes.generate import COMMAND, Setting, differences, main, planned, settings, stale, text_of
from omnicompile.support import not_executable

SETTINGS = {setting.name: setting for setting in settings()}
# Quick to trace, and one of each kind: dense, experts, encoders frozen and trained.
QUICK = ("llama-3.1-8b-8xh100-32k", "qwen3-30b-a3b-16xh100-8k", "qwen2-vl-7b-8xh100-192k")
# As published: model cards, safetensors metadata, technical reports (docs/models.md). The composed one by its parts.
PARAMETERS = {
    "llama_3_1_8b": 8_030_261_248,
    "llama_3_1_70b": 70_553_706_496,
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen3_235b_a22b": 235_093_634_560,
    "deepseek_v3": 671_026_404_352,
    "qwen2_vl_7b": 8_291_375_616,
    "qwen2_vl_72b": 73_405_560_320,
    "qwen2_5_vl_72b": 73_410_777_344,
    "qwen3_omni_30b_a3b": 31_719_205_488,
    "omni_moe_30b_a3b": 31_838_483_456,
    # Language model, encoders with their projectors, decoder.
    "omni_janus": 6_910_365_696 + 324_668_416 + 172_722_827,
    "omni_llama": 8_030_261_248 + 708_015_616 + 674_725_888 + 371_512_143,
    "omni_qwen3_moe": 30_532_122_624 + 688_088_576 + 651_653_120 + 312_769_359,
}
SPECS = [
    pytest.param(spec, marks=pytest.mark.slow if "deepseek" in spec else ())  # built expert by expert
    for spec in sorted({setting.model for setting in SETTINGS.values()})
]


def test_there_is_one_file_for_every_setting_and_no_other() -> None:
    assert {recipe.name for recipe in recipes()} == set(SETTINGS)


@pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: recipe.name)
def test_a_recipe_loads_and_is_what_was_asked_for(recipe: Recipe) -> None:
    plan, setting = recipe.load(), SETTINGS[recipe.name]
    assert (plan.model, plan.cluster, plan.workload) == (setting.model, setting.cluster, setting.workload)
    assert plan.prediction is not None and plan.prediction.fits
    assert plan.prediction.tokens_per_second_per_gpu > 0
    assert plan.global_batch == (setting.workload.global_batch or setting.cluster.gpus)
    assert not not_executable(plan)
    assert recipe.text() == text_of(plan), "the file is not as the generator writes it"


@pytest.mark.parametrize("spec", SPECS)
def test_a_model_has_its_published_size(spec: str) -> None:
    source = load_model_source(spec)
    module = source.build_meta()
    assert all(parameter.is_meta for parameter in module.parameters())
    assert sum(parameter.numel() for parameter in module.parameters()) == PARAMETERS[source.name]


@pytest.mark.parametrize("name", QUICK)
def test_the_planner_still_says_so(name: str) -> None:
    found = stale(SETTINGS[name])
    assert not found, f"regenerate with `{COMMAND} {name}`: {'; '.join(found)}"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in QUICK])
def test_the_planner_still_says_so_of_the_others(name: str) -> None:
    test_the_planner_still_says_so(name)


@pytest.mark.parametrize("name", QUICK[:1])
def test_a_recipe_as_pins_gives_the_same_plan(name: str) -> None:
    setting = SETTINGS[name]
    source, pins = load_model_source(setting.model), load_pins(setting.path)
    again = plan_source(source, setting.cluster, setting.workload, pins).plans[0]
    saved = load_recipe(setting.path)
    assert replace(again, prediction=None, notes=()) == replace(saved, prediction=None, notes=())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-3.1-8b-8xh100-8k", "qwen2-vl-7b-8xh100-32k"])
def test_one_rank_of_a_recipe_is_traced_at_full_size(name: str) -> None:
    from omnicompile.lowering.dry_run import dry_run
    from omnicompile.lowering.full_size import full_batch

    plan = find(name).load()
    source = load_model_source(plan.model)
    model = source.build_meta().train()
    found = dry_run(model, full_batch(source, model, plan.workload, plan.micro_batch), plan)
    assert plan.prediction is not None
    memory = plan.prediction.memory
    predicted = plan.prediction.memory_total - memory["context"] - memory["allocator slack"]
    assert found.peak_bytes + found.optimizer_bytes == pytest.approx(predicted, rel=0.1)
    assert found.step_seconds(plan.accumulation) == pytest.approx(plan.prediction.step_seconds, rel=0.1)


def test_a_changed_choice_and_a_changed_figure_are_found() -> None:
    plan = find(QUICK[0]).load()
    assert plan.prediction is not None
    other = replace(plan, micro_batch=2, accumulation=1)
    assert [line.partition(":")[0] for line in differences(plan, other)] == ["micro_batch", "accumulation"]
    slower = replace(plan, prediction=replace(plan.prediction, step_seconds=plan.prediction.step_seconds * 1.001))
    assert [line.partition(":")[0] for line in differences(plan, slower)] == ["prediction.step_seconds"]
    noise = replace(plan, prediction=replace(plan.prediction, step_seconds=plan.prediction.step_seconds * (1 + 1e-12)))
    assert differences(plan, noise) == []
    assert differences(plan, plan) == []


def test_check_names_what_is_stale_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = find(QUICK[0]).load()
    (tmp_path / f"{QUICK[0]}.yaml").write_text(dumps(replace(plan, accumulation=plan.accumulation + 1)))
    before = (tmp_path / f"{QUICK[0]}.yaml").read_bytes()
    monkeypatch.setattr("omnicompile.recipes.generate.DIRECTORY", tmp_path)
    monkeypatch.setattr("omnicompile.recipes.generate.planned", lambda setting: plan)
    assert main([QUICK[0], "--check"]) == 1
    assert f"{QUICK[0]}: accumulation: " in capsys.readouterr().out
    assert (tmp_path / f"{QUICK[0]}.yaml").read_bytes() == before
    assert main([QUICK[0]]) == 0
    assert main([QUICK[0], "--check"]) == 0


def test_a_recipe_that_nothing_asks_for_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = find(QUICK[0]).load()
    (tmp_path / "old-8xh100-8k.yaml").write_text(dumps(plan))
    monkeypatch.setattr("omnicompile.recipes.generate.DIRECTORY", tmp_path)
    monkeypatch.setattr("omnicompile.recipes.generate.planned", lambda setting: plan)
    assert main([QUICK[0]]) == 1
    assert "old-8xh100-8k: not in models.yaml any more" in capsys.readouterr().out


def test_a_setting_that_does_not_fit_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(setting: Setting) -> None:
        raise InputError("nothing fits")

    monkeypatch.setattr("omnicompile.recipes.generate.planned", refuse)
    assert main([QUICK[0], "--check"]) == 1
    assert f"{QUICK[0]}: nothing fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- {name: a, model: m}", "must have `gpus`"),
        ("- {name: a, model: m, gpus: {8: [x]}}", "must be a whole number"),
        ("- {name: a, model: m, gpus: {8: [8]}, frozen: [vision]}", "did you mean freeze?"),
        ("- {name: a, model: m, gpus: {8: [8, 8]}}", "asked for twice"),
        ("{}", "must be a list"),
    ],
)
def test_a_wrong_line_is_one_clear_error(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(text)
    with pytest.raises((InputError, RecipeError), match=said):
        settings(path)


def test_a_line_makes_recipes(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(
        "- {name: net, model: 'package.nets:wide', gpu: h200, freeze: [vision], gpus: {8: [8], 4096: [8, 96]}}"
    )
    first, second, third = settings(path)
    assert first.name == "net-8xh200-8k" and first.model == "package.nets:wide"
    assert first.workload.freeze == ("vision",) and first.workload.global_batch is None
    assert second.workload.global_batch == 2048  # 16 M tokens
    assert third.workload.global_batch == 128  # 170 samples of 96 K tokens would be 16 M; a power of two of them


def test_unknown_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"no recipe 'llama-8b' \(did you mean llama-3.1-8b"):
        find("llama-8b")
    assert main(["llama-3.1-8b-8xh100-8"]) == 2
    assert "did you mean llama-3.1-8b-8xh100-8k" in capsys.readouterr().err


def test_recipes_are_sorted_by_size() -> None:
    names = [recipe.name for recipe in recipes()]
    assert names.index("llama-3.1-8b-8xh100-8k") < names.index("llama-3.1-8b-8xh100-32k")
    assert names.index("llama-3.1-8b-8xh100-128k") < names.index("llama-3.1-8b-64xh100-8k")


def test_the_settings_plan_on_their_own() -> None:
    """`planned` asks the planner for what the setting says, and nothing else."""
    setting = SETTINGS[QUICK[0]]
    plan = planned(setting)
    assert (plan.model, plan.cluster, plan.workload) == (setting.model, setting.cluster, setting.workload)
    assert setting.path == DIRECTORY / f"{setting.name}.yaml"
