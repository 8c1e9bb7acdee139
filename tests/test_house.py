"""Rules of the house that no linter checks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = sorted(path for folder in ("omnicompile", "passes", "cost_model") for path in (ROOT / folder).rglob("*.py"))
FAMILIES = re.compile(
    r"qwen|llama|deepseek|whisper|siglip|janus|gemma|llava|mi[sx]tral|internvl|emu3|kimi|minicpm|pixtral|idefics", re.I
)
MODELS = ROOT / "omnicompile" / "recipes" / "models"
"""Data of the recipe zoo: the one place that names models."""
PRIVATE_TORCH = re.compile(
    r"torch\._(inductor|functorch|subclasses|C|dynamo)\b|torch\.distributed\.tensor\._|_c10d_functional import"
)
IMPORTS = re.compile(r"^\s*(?:from|import) omnicompile\.(\w+)", re.M)
# What each part may not import: everything that stands above it.
ABOVE = {
    "capture": {"cli", "planner", "lowering", "runtime", "report"},
    "calibration": {"cli", "planner", "lowering", "runtime", "report"},
    "cost_model": {"cli", "planner", "lowering", "runtime", "report"},
    "passes": {"cli", "planner", "lowering", "runtime", "report"},
    "planner": {"cli"},
    "kernels": {"cli", "planner", "lowering", "runtime", "report", "train"},
    "data": {"cli", "planner", "lowering", "train"},
    "checkpoint": {"cli", "planner", "data", "train"},
    "omni": {"cli", "planner", "train"},
    "export": {"cli"},
    "recipes": {"cli", "train"},
    "lowering": {"cli"},
    "runtime": {"cli"},
    "train": {"cli", "export"},
    "report": {"cli"},
}


def test_there_is_code_to_check() -> None:
    assert len(CODE) > 50


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_keeps_the_rules(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert path.parent == MODELS or not FAMILIES.findall(text), "names a model family"
    assert path.name == "torch_compat.py" or not PRIVATE_TORCH.findall(text), "uses a private part of torch"
    assert text.count("\n") <= 500, "is longer than 500 lines"
    parts = path.relative_to(ROOT).parts
    part = parts[1] if parts[0] == "omnicompile" else parts[0]
    wrong = set(IMPORTS.findall(text)) & ABOVE.get(part, set())
    assert not wrong, f"imports what stands above it: {wrong}"
