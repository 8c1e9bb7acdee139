"""What the documents show is what the code does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from omnicompile.capture.source import load_model_source
from omnicompile.plan import Plan
from omnicompile.recipe import dumps

ROOT = Path(__file__).parent.parent


def fenced(document: str, marker: str) -> str:
    """The text of the code block after a marker, "" if there is none before the end marker."""
    text = (ROOT / document).read_text(encoding="utf-8")
    found = re.search(rf"<!-- {marker} -->\n```\w*\n(.*?)\n```", text, re.DOTALL)
    return found.group(1) if found else ""


def test_the_recipe_in_the_document(sample_plans: list[Plan]) -> None:
    assert fenced("docs/recipes.md", "recipe") + "\n" == dumps(replace(sample_plans[0], prediction=None, notes=()))


def test_the_readme_names_one_test_command() -> None:
    command = fenced("README.md", "test-command")
    assert command.count("\n") == 0
    assert "pytest" in command


def test_the_plan_in_the_readme(tmp_path: Path) -> None:
    """The output shown is the output, but for the line that says how long planning took."""
    shown = fenced("README.md", "plan-output")
    if not shown:
        pytest.skip("the README shows no plan yet")
    done = subprocess.run(
        [sys.executable, "-m", "omnicompile", "plan", "examples/qwen2_vl_72b.py", "--gpus", "128"],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "100", "OMNICOMPILE_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert _without_seconds(done.stdout) == _without_seconds(shown)


def _without_seconds(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and "considered," not in line]


# Of the published checkpoints: their total parameters. Of the hand-written model: what its docstring rounds.
SIZES = {
    "qwen2_vl_72b": 73_405_560_320,
    "qwen2_vl_7b": 8_291_375_616,
    "llama_3_1_8b": 8_030_261_248,
    "qwen3_30b_a3b": 30_532_122_624,
    "custom_model": 1_246_147_584,
}


@pytest.mark.parametrize("name", SIZES)
def test_examples_have_their_sizes(name: str) -> None:
    module = load_model_source(str(ROOT / "examples" / f"{name}.py")).build_meta()
    assert sum(parameter.numel() for parameter in module.parameters()) == SIZES[name]
