"""`omnicompile simulate` and `compare`: given layouts, priced without a search."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 1024,
    "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def test_a_layout_is_priced_as_stated(run: Run, model: Path) -> None:
    outcome = run(
        "simulate", str(model), "--gpus", "8", "--seq-len", "4096", "--layout", "sp=2, recompute=full", "--json"
    )
    assert outcome.code == 0, outcome.err
    plan = json.loads(outcome.out)["plan"]
    assert plan["mesh"]["sp"] == 2 and plan["mesh"]["dp_shard"] == 4
    assert plan["micro_batch"] * plan["accumulation"] * 4 == 8
    assert {block["recompute"] for block in plan["blocks"].values()} == {"full"}
    assert plan["prediction"]["step_seconds"] > 0


def test_what_is_priced_and_not_executed_is_named(run: Run, model: Path, tmp_path: Path) -> None:
    layout = "tp=2, pp=2, pipeline_chunks=2, sharding=zero1, gemm_dtype=float8, recompute_share=0.5"
    common = ("simulate", str(model), "--gpus", "8", "--seq-len", "4096", "--layout", layout)
    plan = json.loads(run(*common, "--json").out)["plan"]
    assert plan["mesh"]["tp"] == plan["mesh"]["pp"] == plan["mesh"]["dp_shard"] == 2
    assert plan["stack"]["gemm_dtype"] == "float8" and plan["stack"]["recompute_share"] == 0.5
    assert any("tp (mesh.tp=1 avoids it)" in note for note in plan["notes"])
    text = run(*common).out
    assert "pp 2 x dp_shard 2 x tp 2 = 8 ranks" in text and "gemm_dtype float8" in text
    assert "text: only the optimizer's state sharded (text.sharding=fsdp avoids it)" in " ".join(text.split())


def test_it_agrees_with_the_planner_on_the_planners_choice(run: Run, model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "best.yaml"
    common = ("--gpus", "8", "--seq-len", "4096", "--json")
    planned = json.loads(run("plan", str(model), *common, "--out", str(recipe)).out)["plan"]
    again = json.loads(run("simulate", str(model), "--recipe", str(recipe), "--json").out)["plan"]
    assert again["prediction"] == planned["prediction"] and again["blocks"] == planned["blocks"]


def test_the_timeline_of_a_step(run: Run, model: Path, tmp_path: Path) -> None:
    trace = tmp_path / "step.json"
    layout = ("--gpus", "8", "--seq-len", "4096", "--layout", "sp=2")
    outcome = run("simulate", str(model), *layout, "--trace", str(trace))
    assert outcome.code == 0 and "perfetto" in outcome.out
    whole = json.loads(run("simulate", str(model), *layout, "--json").out)["plan"]
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"]
    end = max(e["ts"] + e["dur"] for e in events) / 1e6
    assert whole["accumulation"] * end == pytest.approx(whole["prediction"]["step_seconds"], rel=0.2)
    assert {"all_to_all", "compute"} <= {e["name"] for e in events}


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("sp=3", "do not divide 8 GPUs"),
        ("sp=8", "4 attention heads"),
        ("sp", "not choice=value"),
        ("speed=9", "no field 'speed'"),
        ("tp=8", "which tp=8 does not divide"),
        ("pp=8", "4 layers cannot be dealt out to pp=8"),
        ("micro_batch=3", "micro_batch 3"),
        ("pp=2,pipeline_chunks=9", "4 layers cannot be dealt out to pp=2 stages of 9 chunks"),
        ("expert_tp=2", "expert_tp=2: the model has no experts"),
        ("master_dtype=foo", "master_dtype=foo: must be one of"),
        ("reduce_dtype=float8", "reduce_dtype=float8: must be one of"),
        ("gemm_dtype=float4", "no rate for float4"),
    ],
)
def test_an_impossible_layout_is_one_line(run: Run, model: Path, layout: str, words: str) -> None:
    outcome = run("simulate", str(model), "--gpus", "8", "--seq-len", "4096", "--layout", layout)
    assert outcome.code == 2 and words in outcome.err and outcome.err.count("\n") == 1


def test_two_recipes_are_compared(run: Run, model: Path, tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("a.yaml", "b.yaml")]
    common = ("plan", str(model), "--gpus", "8", "--seq-len", "4096", "--pin")
    for path, pin in zip(paths, ("mesh.sp=1", "mesh.sp=2")):
        assert run(*common, pin, "--out", path).code == 0
    outcome = run("compare", *paths)
    assert outcome.code == 0, outcome.err
    assert "mesh.sp=2" in outcome.out and "s a step instead of" in outcome.out and "exposed all_to_all +" in outcome.out
    view = json.loads(run("compare", *paths, "--json").out)
    assert view["second"]["step_seconds"] > 0 and view["first"]["choices"]["mesh.sp"] == "1"
    assert "the same plan" in run("compare", paths[0], paths[0]).out
