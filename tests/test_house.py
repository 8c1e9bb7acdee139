"""The rules of the house: general code names no model, private torch APIs stay in one file, imports run one way."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path for folder in ("omnicompile", "passes", "cost_model") for path in (ROOT / folder).rglob("*.py")
    if not any(part.is_symlink() for part in path.parents)
)  # fmt: skip
FAMILIES = re.compile(
    r"(?i)(qwen|llama|janus|deepseek|gemma|internvl|llava|mixtral|mistral|whisper|siglip|pixtral|emu3|phi3|phi4|"
    r"gpt_oss|idefics|paligemma|chameleon|minicpm|kimi)"
)
PRIVATE = re.compile(r"torch\._(?!check\b|assert)\w+|torch\.distributed\.(tensor\.)?_(?!functional_collectives\b)\w+")
# Two-part packages in the order of the layers; a layer imports only itself and the ones before it.
LAYERS = (
    {"errors", "schema", "recompute", "program", "plan", "cluster", "workload", "torch_compat", "recipe", "anchors"},
    {"capture", "passes", "cost_model"},
    {"planner", "lowering", "runtime", "report"},
    {"cli", "__main__"},
)


def _rank(module: str) -> int | None:
    return next((i for i, layer in enumerate(LAYERS) if module in layer), None)


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "omnicompile" and len(parts) > 1 else parts[0]


def _module_level_imports(path: Path) -> list[str]:
    """Imported omnicompile subpackages, those for type checkers and inside functions left out."""
    found = []
    for node in ast.parse(path.read_text()).body:
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "omnicompile" else [f"omnicompile.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        found += [n.split(".")[1] for n in names if n.startswith("omnicompile.")]
    return found


def test_sources_are_found() -> None:
    assert len(SOURCES) > 50


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_names_no_model_family(path: Path) -> None:
    lines = path.read_text().splitlines()
    named = [f"{i}: {line.strip()}" for i, line in enumerate(lines, 1) if FAMILIES.search(line)]
    assert not named, "general code must not name a model family:\n" + "\n".join(named)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_private_torch_stays_in_the_adapter(path: Path) -> None:
    if path.name == "torch_compat.py":
        return
    code = [line.split("#")[0] for line in path.read_text().splitlines()]
    used = [f"{i}: {line.strip()}" for i, line in enumerate(code, 1) if PRIVATE.search(line)]
    assert not used, "private torch API outside torch_compat.py:\n" + "\n".join(used)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    own = _rank(_name(path))
    if own is None:
        return
    upward = [name for name in _module_level_imports(path) if (_rank(name) or 0) > own]
    assert not upward, f"{_name(path)} must not import {upward}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500
