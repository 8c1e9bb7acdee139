"""Parts of a model that are not trained."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from omnicompile.errors import InputError
from omnicompile.schema import suggestion


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Take every parameter that a pattern names out of training, before `parallelize`. Returns their names.

    A pattern names parameters ("*.bias") or modules with all that is inside ("model.visual", "*.layers.0"), as in
    shell file names. Raises InputError for a pattern that names nothing, and where nothing is left to train.
    """
    frozen = []
    unused = set(patterns)
    for name, parameter in model.named_parameters():
        hit = {pattern for pattern in patterns if any(fnmatchcase(part, pattern) for part in _above(name))}
        unused -= hit
        if hit:
            parameter.requires_grad_(False)
            frozen.append(name)
    if unused:
        raise InputError(_unknown(model, sorted(unused)[0]))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("freeze leaves nothing to train: no parameter of the model requires a gradient")
    return frozen


def _unknown(model: nn.Module, pattern: str) -> str:
    names = [name for name, _ in model.named_modules() if name]
    known = names if get_close_matches(pattern, names, n=1) else [name for name, _ in model.named_children()]
    return f"freeze: no parameter or module is named {pattern!r}{suggestion(pattern, known)}"


def _above(name: str) -> list[str]:
    """A parameter's name and those of the modules that it is in: a.b.c, a.b, a."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
