"""`omnicompile export`: a file and a report; one line for every bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from omnicompile.plan import LossHead, Plan
from omnicompile.recompute import Recompute

NAME = "qwen2-vl-7b-8xh100-32k"


@pytest.fixture
def recipe(tmp_path: Path, sample_plans: list[Plan]) -> str:
    path = tmp_path / "recipe.yaml"
    sample_plans[0].save(path)
    return str(path)


def test_file_and_report(run: Any, recipe: str, tmp_path: Path) -> None:
    out = tmp_path / "train.yaml"
    outcome = run("export", recipe, "--to", "veomni", "--out", str(out))
    assert (outcome.code, outcome.err) == (0, "")
    assert yaml.safe_load(out.read_text())["train"]["accelerator"]["ulysses_size"] == 4
    assert "approximated vision.layout=images" in outcome.out
    assert f"saved as {out}" in outcome.out


def test_without_out_the_file_is_on_stdout_and_the_report_on_stderr(run: Any) -> None:
    outcome = run("export", NAME, "--to", "accelerate")
    assert outcome.code == 0
    assert yaml.safe_load(outcome.out)["num_processes"] == 8
    assert outcome.err.startswith("accelerate (release 1.15.0): ")


def test_for_programs(run: Any, recipe: str) -> None:
    view = json.loads(run("export", recipe, "--to", "megatron", "--json").out)
    assert view["target"] == "megatron" and view["text"].startswith("# Megatron-LM")
    refused = {entry["choice"]: entry["why"] for entry in view["refused"]}
    assert "language model alone" in refused["vision.sharding"]
    assert any(entry["keys"] == {"--seq-length": 1000} for entry in view["mapped"])


def test_strict(run: Any, tmp_path: Path, sample_plans: list[Plan]) -> None:
    """Nothing is written where something is lost; nothing is said where nothing is."""
    lossy, exact = tmp_path / "lossy.yaml", tmp_path / "exact.yaml"
    sample_plans[0].save(lossy)
    text = replace(sample_plans[0].blocks["text"], recompute=Recompute.FULL)
    replace(sample_plans[0], blocks={"text": text}, loss_head=LossHead.FULL).save(exact)
    out = tmp_path / "args.sh"
    outcome = run("export", str(lossy), "--to", "megatron", "--strict", "--out", str(out))
    assert outcome.code == 2 and outcome.out == "" and not out.exists()
    assert outcome.err.count("\n") == 1 and "refused step.loss_head=chunked" in outcome.err
    assert run("export", str(exact), "--to", "megatron", "--strict", "--out", str(out)).code == 0
    assert "All choices of the plan are in it." in out.read_text()


def test_training_options_of_the_recipe_go_along(run: Any, recipe: str) -> None:
    bare = json.loads(run("export", recipe, "--to", "veomni", "--json").out)
    assert not any(entry["choice"].startswith("train.") for entry in bare["mapped"] + bare["refused"])
    text = Path(recipe).read_text()
    Path(recipe).write_text(
        text + "train: {steps: 40, optimizer: {lr: 2.0e-4}, schedule: {kind: wsd}, accumulation: 2}\n"
    )
    outcome = run("export", recipe, "--to", "megatron")
    assert "--lr 0.0002" in outcome.out and "--lr-wsd-decay-iters 4" in outcome.out
    view = json.loads(run("export", recipe, "--to", "veomni", "--json").out)
    assert {"train.schedule.kind"} <= {entry["choice"] for entry in view["refused"]}
    assert yaml.safe_load(view["text"])["train"]["optimizer"]["lr"] == 2e-4
    Path(recipe).write_text(text + "train: {stepps: 40}\n")
    wrong = run("export", recipe, "--to", "megatron")
    assert wrong.code == 2 and "did you mean steps?" in wrong.err and wrong.err.count("\n") == 1


def test_bad_input_is_one_line(run: Any, recipe: str, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("a: 1\n")
    (tmp_path / "part.yaml").write_text("omnicompile_recipe: 1\nmesh: {sp: 4}\n")
    for arguments, said in (
        ((recipe, "--to", "veomi"), "did you mean veomni?"),
        ((recipe, "--to", "deepspeed"), "known: veomni, torchtitan, accelerate, megatron"),
        ((recipe,), "--to"),
        ((str(tmp_path / "no.yaml"), "--to", "veomni"), "does not exist"),
        ((str(tmp_path / "other.yaml"), "--to", "veomni"), "unknown key 'a'"),
        ((str(tmp_path / "part.yaml"), "--to", "veomni"), "not a whole recipe"),
        (("qwen2-vl-7b-8xh100-32", "--to", "veomni"), f"did you mean {NAME}?"),
        ((recipe, "--to", "veomni", "--out", str(tmp_path / "no" / "x.yaml")), "does not exist"),
        ((recipe, "--to", "veomni", "--out", str(tmp_path)), "is a directory"),
    ):
        outcome = run("export", *arguments)
        assert outcome.code == 2, arguments
        assert outcome.out == "" and outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, arguments
        assert said in outcome.err, (arguments, outcome.err)
