"""The recipe zoo: plans for published models, each made by the planner and shipped as a recipe file.

`models/models.yaml` says what is planned, `python -m omnicompile.recipes.generate` plans it. A recipe names its model
as `package.module:build`, so that `omnicompile compare` and the rest find it wherever they run.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from omnicompile.errors import InputError
from omnicompile.plan import Plan
from omnicompile.recipe import load_recipe

DIRECTORY = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """A recipe of the zoo."""

    name: str
    path: Path

    def load(self) -> Plan:
        return load_recipe(self.path)

    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")


def recipes() -> list[Recipe]:
    """All recipes of the zoo, by name."""
    return [Recipe(path.stem, path) for path in sorted(DIRECTORY.glob("*.yaml"), key=lambda path: _order(path.stem))]


def find(name: str) -> Recipe:
    """The recipe of that name. Raises InputError with the nearest name."""
    known = {recipe.name: recipe for recipe in recipes()}
    if name not in known:
        close = get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}? " if close else ""
        raise InputError(f"the zoo has no recipe {name!r} ({hint}all: omnicompile recipes)")
    return known[name]


def _order(name: str) -> tuple[str, int, str, int]:
    """Model, GPUs, kind of GPU, length: numbers by size."""
    model, machine, length = name.rsplit("-", 2)
    gpus, _, gpu = machine.partition("x")
    return model, int(gpus), gpu, int(length.removesuffix("k"))
