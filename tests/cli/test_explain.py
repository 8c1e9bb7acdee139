"""`omnicompile explain`: what another choice costs, and why one cannot be taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 1024,
    "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
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


def test_a_pin_that_means_nothing(run: Callable[..., Any], config: str) -> None:
    outcome = _explain(run, config, "--why-not", "nothing.sp=1")
    assert "no block 'nothing'" in outcome.out + outcome.err
