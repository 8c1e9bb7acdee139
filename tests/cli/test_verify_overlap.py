"""`omnicompile verify` proves attention in groups of heads and experts in chunks, on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omnicompile.recipes import find

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MOE = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 1024, "hidden_size": 256,
    "intermediate_size": 512, "moe_intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32, "num_experts": 16, "num_experts_per_tok": 2, "output_router_logits": True,
}  # fmt: skip
MOE_VLM = {
    "model_type": "qwen3_vl_moe", "architectures": ["Qwen3VLMoeForConditionalGeneration"],
    "text_config": {
        "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "num_experts": 16,
        "num_experts_per_tok": 2, "rope_parameters": ROPE | {"mrope_section": [6, 5, 5]},
    },
    "vision_config": {
        "depth": 2, "hidden_size": 128, "intermediate_size": 256, "num_heads": 8, "out_hidden_size": 256,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 256,
    },
    "image_token_id": 1000, "video_token_id": 1001, "vision_start_token_id": 1002, "vision_end_token_id": 1003,
}  # fmt: skip
FINER = ("--pin", "overlap.head_groups=2", "--pin", "overlap.expert_chunks=2")


def _config(folder: Path, config: dict[str, Any]) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize("config", [MOE, pytest.param(MOE_VLM, marks=pytest.mark.slow)], ids=["moe", "moe-vlm"])
def test_groups_of_heads_and_chunks_of_experts(run: Callable[..., Any], tmp_path: Path, config: dict[str, Any]) -> None:
    model = _config(tmp_path, config)
    outcome = run("verify", model, "--gpus", "4", *FINER, "--json")
    view = json.loads(outcome.out)
    assert outcome.code == 0 and view["equal"], outcome
    assert (view["overlap"]["head_groups"], view["overlap"]["expert_chunks"]) == (2, 2)
    made = {(item["what"], item["axes"]): item["count"] for item in view["collectives"]}
    assert made["chunked_dispatch", "ep"] == made["chunked_combine", "ep"] == 2 and ("dispatch", "ep") not in made
    # A layer exchanges q, k and v, and the result of two groups of heads. At each of the two places where features are
    # put into the text, features go from rows to channels, and the text there and back.
    assert made["all_to_all", "sp"] == (2 * 5 if config is MOE else 4 * 5 + 2 * 3)
    assert not any("is not cut" in note for note in view["notes"])


def test_a_dense_model_with_images(run: Callable[..., Any]) -> None:
    outcome = run("verify", "examples/qwen2_vl_7b.py", "--gpus", "2", "--pin", "head_groups=2")
    assert outcome.code == 0 and outcome.out.startswith("equal:"), outcome
    assert "overlap      attention in 2 groups of heads\n" in outcome.out


@pytest.mark.parametrize(
    ("pins", "said"),
    [
        (("mesh.sp=1", "overlap.head_groups=2"), "heads are not exchanged (sp=1)"),
        (("mesh.ep=1", "overlap.expert_chunks=2"), "rows of experts are not exchanged (ep=1)"),
        (("overlap.expert_chunks=3",), "does not divide the 4 experts of a rank"),
        (("overlap.expert_chunks=0",), "must be at least 1"),
        (("overlap.chunks=2",), "overlap has no choice 'chunks'"),
        (("overlap.replica_sums=maybe",), "must be true or false"),
    ],
)
def test_what_cannot_be_overlapped_is_refused(
    run: Callable[..., Any], tmp_path: Path, pins: tuple[str, ...], said: str
) -> None:
    typed = [word for pin in pins for word in ("--pin", pin)]
    outcome = run("verify", _config(tmp_path, MOE), "--gpus", "2", *typed)
    assert outcome.code == 2 and said in outcome.err and outcome.err.count("\n") == 1, outcome


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_recipe_with_more_chunks_than_the_tiny_copy_allows(run: Callable[..., Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    plan = find("qwen3-235b-a22b-128xh100-32k").load()
    plan.save(recipe)
    assert plan.overlap.expert_chunks == 8 and plan.overlap.head_groups == 2
    outcome = run("verify", _config(tmp_path, MOE), "--recipe", str(recipe), "--json")
    view = json.loads(outcome.out)
    assert outcome.code == 0 and view["equal"], outcome
    assert view["overlap"]["expert_chunks"] in (2, 4) and view["overlap"]["head_groups"] == 2
