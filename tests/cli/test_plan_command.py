"""`omnicompile plan`: what reaches the planner, what is printed, and one line for every bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omnicompile.cluster import Cluster
from omnicompile.errors import InfeasibleError
from omnicompile.recipe import load_recipe
from omnicompile.workload import Workload


def test_the_report(run: Any, asked: Any, model: str) -> None:
    outcome = run("plan", model, "--gpus", "128")
    assert (outcome.code, outcome.err) == (0, "")
    for said in (
        "tokens/s/GPU",
        "Memory",
        "Next best",
        "more all-to-all",
        "1,234 plans considered, 56 of them simulated",
        "capture 2.50 s",
    ):
        assert said in outcome.out
    assert "\x1b" not in outcome.out
    assert asked.arguments["cluster"] == Cluster(128)
    assert asked.arguments["workload"] == Workload()
    assert (asked.which, asked.arguments["pins"], asked.arguments["cache"]) == ("plan_source", {}, True)


def test_every_option_reaches_the_planner(run: Any, asked: Any, model: str) -> None:
    cluster = "--gpus 64 --gpu h200 --gpus-per-node 4 --price 2.5"
    sample = (
        "--seq-len 4096 --images 3 --image-size 448x896 --audio-seconds 12.5 --global-batch 256 --freeze vision,audio"
    )
    outcome = run(
        "plan", model, *cluster.split(), *sample.split(), "--pin", "vision.sp=1", "--pin", "sp=4", "--no-cache"
    )
    assert outcome.code == 0
    assert asked.arguments["cluster"] == Cluster(64, "h200", 4, 2.5)
    assert asked.arguments["workload"] == Workload(4096, 3, (448, 896), 12.5, 256, ("vision", "audio"))
    assert asked.arguments["pins"] == {"vision.sp": "1", "mesh.sp": "4"}
    assert asked.arguments["cache"] is False


def test_what_a_model_prints_is_not_in_the_json(run: Any, asked: Any, model: str) -> None:
    with open(model, "a") as file:
        file.write("\nprint('loading')\n")
    outcome = run("plan", model, "--gpus", "16", "--json")
    assert json.loads(outcome.out)["plan"]
    assert outcome.err == "loading\n"


def test_json(run: Any, asked: Any, model: str) -> None:
    view = json.loads(run("plan", model, "--gpus", "16", "--json", "--top", "2").out)
    assert view["plan"]["mesh"]["sp"] == 4
    assert [entry["why_it_lost"] for entry in view["alternatives"]] == ["more all-to-all"]
    assert (view["explored"], view["seconds"]["search"]) == (1234, 0.25)


def test_top_one_shows_no_alternatives(run: Any, asked: Any, model: str) -> None:
    assert "Next best" not in run("plan", model, "--gpus", "16", "--top", "1").out


def test_the_saved_recipe_is_the_best_plan_and_plans_again(run: Any, asked: Any, model: str, tmp_path: Path) -> None:
    out = str(tmp_path / "recipe.yaml")
    assert f"saved as {out}" in run("plan", model, "--gpus", "16", "--seq-len", "77", "--out", out).out
    plan = load_recipe(out)
    assert (plan.model, plan.workload.seq_len) == (model, 77)
    outcome = run("plan", model, "--recipe", out, "--pin", "mesh.sp=2", "--images", "1")
    assert outcome.code == 0
    assert asked.arguments["cluster"] == plan.cluster
    assert (asked.arguments["workload"].seq_len, asked.arguments["workload"].images) == (77, 1)
    assert (asked.arguments["pins"]["mesh.sp"], asked.arguments["pins"]["text.layout"]) == ("2", "sequence")


def test_the_workload_of_the_file_then_the_recipe_then_the_command_line(
    run: Any, asked: Any, model: str, tmp_path: Path
) -> None:
    with open(model, "a") as file:
        file.write("\ndef workload():\n    return {'seq_len': 10, 'images': 5, 'global_batch': 64}\n")
    recipe = tmp_path / "part.yaml"
    recipe.write_text("omnicompile_recipe: 1\nworkload: {images: 6, global_batch: 32}\n")
    run("plan", model, "--gpus", "8", "--recipe", str(recipe), "--global-batch", "16")
    assert asked.arguments["workload"] == Workload(seq_len=10, images=6, global_batch=16)


@pytest.mark.parametrize(("option", "which"), [("--min-gpus", "min_gpus"), ("--max-seq-len", "max_seq_len")])
def test_the_other_questions(run: Any, asked: Any, model: str, option: str, which: str) -> None:
    assert run("plan", model, "--gpus", "8", option).code == 0
    assert asked.which == which


def test_min_gpus_needs_no_gpus(run: Any, asked: Any, model: str) -> None:
    assert run("plan", model, "--min-gpus").code == 0
    assert asked.arguments["cluster"].gpus >= 1024


BAD = [
    ("missing.py --gpus 8", "missing.py does not exist"),
    ("MODEL", "--gpus is needed"),
    ("MODEL --gpus 0", "--gpus must be at least 1, got 0"),
    ("MODEL --gpus -8", "--gpus must be at least 1, got -8"),
    ("MODEL --gpus 12", "12 GPUs are not whole nodes of 8: use a multiple of 8, or set --gpus-per-node"),
    ("MODEL --gpus eight", "argument --gpus: invalid int value: 'eight'"),
    ("MODEL --gpus 8 --gpus-per-node 0", "--gpus-per-node must be at least 1"),
    ("MODEL --gpus 8 --gpu h99", "unknown GPU 'h99': known are "),
    ("MODEL --gpus 8 --price -1", "--price must not be negative"),
    ("MODEL --gpus 8 --seq-len 0", "--seq-len must be at least 1"),
    ("MODEL --gpus 8 --global-batch 0", "--global-batch must be at least 1"),
    ("MODEL --gpus 8 --images -1", "images per sample must not be negative"),
    ("MODEL --gpus 8 --image-size big", "'big' is not HEIGHTxWIDTH"),
    ("MODEL --gpus 8 --image-size 0x8", "image size must be positive"),
    ("MODEL --gpus 8 --freeze ,", "is not a list of names"),
    ("MODEL --gpus 8 --pin vision", "write it as block.choice=value"),
    ("MODEL --gpus 8 --pin vision.spp=1", "has no choice 'spp' (did you mean sp?)"),
    ("MODEL --gpus 8 --top 0", "--top must be at least 1"),
    ("MODEL --gpus 8 --recipe missing.yaml", "recipe missing.yaml does not exist"),
    ("MODEL --gpus 8 --out missing/r.yaml", "directory missing does not exist"),
    ("MODEL --gpus 8 --config c.json", "--config goes with package.module:Class"),
    ("MODEL --gpus 8 --min-gpus --max-seq-len", "not allowed with argument"),
    ("MODEL --gpu", "expected one argument"),
    ("MODEL --bogus", "unrecognized arguments: --bogus"),
    ("", "the following arguments are required: MODEL"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_line_and_exit_code_2(run: Any, asked: Any, model: str, arguments: str, message: str) -> None:
    outcome = run("plan", *arguments.replace("MODEL", model).split())
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ") and message in outcome.err
    assert outcome.err.count("\n") == 1


BAD_FILES = [
    ("model.py", "x = 1\n", "has no build()"),
    ("model.py", "def build():\n    raise ValueError('bad\\nworse')\n", "raised ValueError: bad (TMP/model.py:2)"),
    ("model.py", "def build():\n    return 1\n", "must return a torch.nn.Module"),
    ("model.py", "def build(:\n", "raised SyntaxError"),
    ("config.json", "{", "malformed JSON"),
    ("config.json", '{"model_type": "nothing-like-it"}', "unknown model_type 'nothing-like-it'"),
    ("config.json", '{"architectures": ["NothingLikeIt"]}', "unknown class 'NothingLikeIt'"),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD_FILES)
def test_models_that_cannot_be_built(
    run: Any, asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, message: str
) -> None:
    import omnicompile.planner

    plan: Callable[..., Any] = vars(omnicompile.planner)["api"].plan_source

    def building(source: Any, *rest: Any) -> Any:
        source.build_meta()
        return plan(source, *rest)

    monkeypatch.setattr(vars(omnicompile.planner)["api"], "plan_source", building)
    (tmp_path / name).write_text(text)
    outcome = run("plan", str(tmp_path / name), "--gpus", "8")
    assert (outcome.code, outcome.out) == (2, "")
    assert message.replace("TMP", str(tmp_path)) in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the recipe is empty"),
        ("mesh: {sp: 4}\n", "the line 'omnicompile_recipe: 1' is missing"),
        ("omnicompile_recipe: 1\nmesh: {sp: 4\n", "malformed YAML"),
        ("omnicompile_recipe: 1\nmesh: {spp: 4}\n", "part.yaml:2: mesh.spp: unknown key 'spp' (did you mean sp?)"),
        ("omnicompile_recipe: 1\ncluster: {gpu: 4}\n", "cluster.gpu: must be text, got 4"),
        ("omnicompile_recipe: 9\n", "schema version 9"),
    ],
)
def test_bad_recipes(run: Any, asked: Any, model: str, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "part.yaml").write_text(text)
    outcome = run("plan", model, "--gpus", "8", "--recipe", str(tmp_path / "part.yaml"))
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


def test_nothing_fits(run: Any, asked: Any, model: str) -> None:
    asked.error = InfeasibleError("short by 3.2 GiB per GPU; would fit: 256 GPUs\nor offload")
    outcome = run("plan", model, "--gpus", "8")
    assert (outcome.code, outcome.err) == (2, "error: short by 3.2 GiB per GPU; would fit: 256 GPUs or offload\n")


def test_a_bug_is_one_line_too(run: Any, asked: Any, model: str) -> None:
    asked.error = ZeroDivisionError("division by zero")
    outcome = run("plan", model, "--gpus", "8")
    assert outcome.code == 1
    assert outcome.err == "internal error: ZeroDivisionError: division by zero (run with --debug for the traceback)\n"


def test_debug_shows_the_traceback(run: Any, asked: Any, model: str) -> None:
    asked.error = InfeasibleError("short")
    with pytest.raises(InfeasibleError):
        run("plan", model, "--gpus", "8", "--debug")


def test_an_interrupt(run: Any, asked: Any, model: str) -> None:
    asked.error = KeyboardInterrupt()
    assert run("plan", model, "--gpus", "8").code == 130
