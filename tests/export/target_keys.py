"""The keys that targets define, and which values they take."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml

KEYS = Path(__file__).parents[2] / "omnicompile" / "export" / "keys"


@cache
def known(target: str) -> dict[str, Any]:
    data = yaml.safe_load((KEYS / f"{target}.yaml").read_text())
    return data if isinstance(data, dict) else {}


def takes(annotation: str, value: Any) -> bool:
    """Whether a value is of an annotated type, as the target's source writes it."""
    text = re.sub(r"Optional\[(.*)\]$", r"\1", annotation.replace(" | None", ""))
    if value is None:
        return text != annotation
    if text.startswith("Literal"):
        return value in yaml.safe_load(text.removeprefix("Literal"))
    if text.lower().startswith("list"):
        item = text[5:-1]
        return all(takes(item, entry) for entry in (value if isinstance(value, list) else [value]))
    kinds = {"int": int, "bool": bool, "str": str, "float": (int, float), "float | int": (int, float)}
    return isinstance(value, kinds[text]) and (text == "bool" or not isinstance(value, bool))
