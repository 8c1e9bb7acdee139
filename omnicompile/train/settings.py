"""Training options from a YAML file and the command line."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from omnicompile.errors import InputError
from omnicompile.recipe import read_yaml
from omnicompile.schema import Place, check_keys, decode, mapping
from omnicompile.train.options import TrainOptions

SECTION = "train"


def load_options(recipe: str | Path, own: str | Path | None = None, sets: Sequence[str] = ()) -> TrainOptions:
    """The options of the recipe's `train:` section, overridden key by key by those of the file `own` (its `train:`
    section, the only one that it has), then by `sets` ("optimizer.lr=3e-4").

    Raises RecipeError or InputError naming file, line and key of what is wrong.
    """
    parts = [_section(Path(recipe), whole=False)]
    if own is not None:
        parts.append(_section(Path(own), whole=True))
    parts.append((parse_sets(sets), Place("--set")))
    merged: dict[str, Any] = {}
    for data, place in parts:
        with contextlib.suppress(InputError):  # what does not go together may be put right by a later part
            decode(TrainOptions, data, place)
        merged = _merged(merged, data)
    options = decode(TrainOptions, merged, Place("training options"))
    assert isinstance(options, TrainOptions)
    return options


def parse_sets(sets: Sequence[str]) -> dict[str, Any]:
    """["optimizer.lr=3e-4", "steps=10"] as {"optimizer": {"lr": 3e-4}, "steps": 10}; values are YAML."""
    found: dict[str, Any] = {}
    for item in sets:
        key, equals, text = item.partition("=")
        path = key.strip().split(".")
        if not equals or not all(path):
            raise InputError(f"--set {item}: write it as option=value, such as --set optimizer.lr=3e-4")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"--set {item}: {text!r} is not a value") from error
        nested: Any = value
        for part in reversed(path):
            nested = {part: nested}
        found = _merged(found, nested)
    return found


def _section(path: Path, whole: bool) -> tuple[dict[str, Any], Place]:
    """The `train:` section of a file. whole: there must be one, and nothing else."""
    data, place = read_yaml(path, "training options" if whole else "recipe")
    if whole:
        check_keys(data, (SECTION,), place)
        if SECTION not in data:
            raise place.error(f"section '{SECTION}:' is missing")
    section = place.key(SECTION)
    return mapping(data.get(SECTION) or {}, section), section


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = _merged(found[key], value) if both else value
    return found
