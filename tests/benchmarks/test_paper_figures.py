"""The script that predicts the paper's figures, on a tiny model."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = """
def build():
    from transformers import AutoModelForImageTextToText, Qwen2VLConfig

    text = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2, "patch_size": 14,
              "spatial_merge_size": 2, "temporal_patch_size": 2}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False,
                           image_token_id=250, video_token_id=251, vision_start_token_id=252, vision_end_token_id=253)
    return AutoModelForImageTextToText.from_config(config, dtype="bfloat16")
"""


@pytest.fixture()
def figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("OMNICOMPILE_CACHE", str(tmp_path / "cache"))
    return import_module("paper_figures")


def test_a_figure_of_a_tiny_model(figures: ModuleType, tmp_path: Path) -> None:
    model = tmp_path / "tiny_model.py"
    model.write_text(TINY)
    points = import_module("paper_points")
    figure = points.Figure("tiny", "A tiny model", str(model), 8, (1, 2), (1,), (4096, 8192), "nothing", 8192, 0.5)
    result = points.figure_result(figure)
    assert {(p.sp, p.seq_len, p.plan) for p in result.points} == {
        (sp, n, kind) for sp in (1, 2) for n in (4096, 8192) for kind in ("paper", "best")
    }
    assert all(p.fits and not p.error and p.speed > 0 for p in result.points)
    assert {e.plan for e in result.longest} == set(points.KINDS)
    assert all("recompute full" in p.choices and "chunked" in p.choices for p in result.points if p.plan == "paper")
    assert result.implied_speed > 0
    assert not [check for check in result.checks if "best plan" in check or "needs less memory" in check]
    text = figures.markdown([result], [], {"date": "today"})
    assert "A tiny model" in text and "SP 2:" in text
    assert json.loads(figures.json_text({"figures": [points.asdict(result)]}))["figures"][0]["points"]


def test_checks_find_what_cannot_be_right(figures: ModuleType) -> None:
    points = import_module("paper_points")
    figure = points.FIGURES[0]
    paper = points.Point(1, 1, 8192, "paper", True, speed=2.0, mfu=0.5, memory=10.0)
    longer = points.Point(1, 1, 16384, "paper", True, speed=2.0, mfu=0.9, memory=9.0)
    best = points.Point(1, 1, 8192, "best", True, speed=1.0, mfu=0.5)
    offloads = points.Point(1, 1, 4096, "best", True, host=3.0)
    longest = [points.Longest(1, 1, "best", 4096, offloads), points.Longest(2, 1, "best", 2048)]
    found = points.checks(points.Result(figure, "", [paper, longer, best], longest))
    for words in ("not as fast", "needs less memory", "MFU 90.0%", "3.0 TB", "does not grow with SP"):
        assert any(words in line for line in found), words


@pytest.mark.slow
def test_the_published_shape(figures: ModuleType) -> None:
    points = import_module("paper_points")
    (point,) = points.veomni_points(only_first=True)
    assert point["paper"]["fits"] and "speed_error" in point
    assert "VEO-001" in figures.markdown([], [point], {})
