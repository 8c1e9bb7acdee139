"""`omnicompile explain`: what another choice costs, and why one cannot be taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 1024,
    "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip

EXPERTS = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 32000, "hidden_size": 1024,
    "intermediate_size": 2816, "moe_intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 32, "num_experts_per_tok": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def _explain(run: Callable[..., Any], config: str, *more: str) -> Any:
    return run("explain", config, "--gpus", "8", "--seq-len", "4096", *more)


def test_why_the_best_won(run: Callable[..., Any], config: str) -> None:
    outcome = _explain(run, config)
    assert outcome.code == 0 and outcome.out.startswith("the best plan: ") and "slower" in outcome.out


def test_what_a_choice_costs(run: Callable[..., Any], config: str) -> None:
    outcome = _explain(run, config, "--why-not", "sp=4")
    assert "with mesh.sp=4: " in outcome.out and "mesh.sp=4" in outcome.out.splitlines()[2]
    view = json.loads(_explain(run, config, "--why-not", "sp=4", "--json").out)
    assert view["other"]["choices"]["mesh.sp"] == "4" and view["other"]["time"]
    assert view["other"]["step_seconds"] >= view["step_seconds"]


def test_why_a_choice_cannot_be(run: Callable[..., Any], config: str) -> None:
    outcome = _explain(run, config, "--why-not", "sp=8")
    assert outcome.code == 0 and "impossible" in outcome.out and "heads" in outcome.out


def test_the_best_plan_itself(run: Callable[..., Any], config: str) -> None:
    best = json.loads(_explain(run, config, "--json").out)["best"]
    outcome = _explain(run, config, "--why-not", f"sp={best['mesh.sp']}")
    assert "it is the best plan already" in outcome.out


def _ways(run: Callable[..., Any], config: str, *more: str) -> dict[str, str]:
    """What is said of each way of overlapping, by its name and value."""
    out = _explain(run, config, *more).out
    _, _, below = out.partition("communication beside compute, each way on only where the simulation gains:\n")
    return dict(line.strip().split(": ", 1) for line in below.splitlines())


def test_ways_of_overlapping_that_gain(run: Callable[..., Any], config: str) -> None:
    said = _ways(run, config, "--pin", "mesh.sp=4", "--pin", "text.sharding=fsdp", "--pin", "overlap.exchanges=true")
    assert [name.partition("=")[0] for name in said] == [
        "exchanges", "head_groups", "expert_chunks", "prefetch", "replica_sums"
    ]  # fmt: skip
    assert said["exchanges=true"].startswith("with false the step is ")
    assert said["head_groups=1"] == "head_groups=2: with sp=4 no rank's heads can be cut into 2 equal groups"
    assert said["expert_chunks=1"] == "rows of experts are not exchanged (ep = 1)"
    assert said["prefetch=1"].startswith("parameters are gathered while the layer before computes")
    assert said["replica_sums=false"] == "no parameters with replicas"


def test_ways_of_overlapping_without_exchanges(run: Callable[..., Any], config: str) -> None:
    fsdp = _ways(run, config, "--pin", "mesh.sp=1", "--pin", "text.sharding=fsdp")
    assert fsdp["exchanges=true"] == "no exchanges (sp = 1, ep = 1)"
    assert fsdp["head_groups=1"] == "heads are not exchanged (sp = 1)"
    whole = _ways(run, config, "--pin", "mesh.sp=1", "--pin", "text.sharding=replicate")
    assert whole["prefetch=1"] == "no parameters are gathered"
    (sums,) = (words for name, words in whole.items() if name.startswith("replica_sums="))
    assert sums.startswith("with ") and "the step is" in sums


def test_ways_of_overlapping_experts(run: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(EXPERTS))
    pins = ("--pin", "mesh.sp=1", "--pin", "mesh.ep=8", "--pin", "overlap.exchanges=true")
    said = _ways(run, str(path), *pins)
    assert said["exchanges=true"].startswith("with false the step is ")
    (chunks,) = (words for name, words in said.items() if name.startswith("expert_chunks="))
    assert chunks.startswith("with ") and "the step is" in chunks
    assert said["head_groups=1"] == "heads are not exchanged (sp = 1)"


def test_a_pin_that_means_nothing(run: Callable[..., Any], config: str) -> None:
    outcome = _explain(run, config, "--why-not", "nothing.sp=1")
    assert "no block 'nothing'" in outcome.out + outcome.err
