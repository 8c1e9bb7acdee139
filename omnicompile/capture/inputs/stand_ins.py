"""Placeholder token ids that a configuration leaves open.

Which token stands for a feature of an image or a clip changes no size and no cost, but without one a model cannot merge
the features into its text. A capture therefore takes free ids of the vocabulary where the configuration says None.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from omnicompile.capture.inputs.facts import special_ids, text_config

_PLACEHOLDER = re.compile(r"^(image|audio|video)_token_(id|index)$")


@contextlib.contextmanager
def placeholders_filled(model: nn.Module) -> Iterator[tuple[str, ...]]:
    """While active, placeholder ids that are None in the model's configurations, or that a module copied from there,
    are ids at the end of the vocabulary that have no other meaning. Gives a note per id; all is put back at the end."""
    changed, notes = _fill(model)
    try:
        yield notes
    finally:
        for owner, name in changed:
            setattr(owner, name, None)


def fill_placeholders(model: nn.Module) -> None:
    """The same for good: for a model that is made to be run."""
    _fill(model)


def _fill(model: nn.Module) -> tuple[list[tuple[Any, str]], tuple[str, ...]]:
    """What was changed, and a note per id."""
    config = getattr(model, "config", None)
    open_fields = [(owner, name) for owner in _owners(model) for name in _open_names(owner)]
    stated = [name for owner, name in open_fields if not isinstance(owner, nn.Module)]
    if config is None or not stated:
        return [], ()
    ids = _free_ids(config, {_modality(name) for name in stated})
    changed = [(owner, name) for owner, name in open_fields if _modality(name) in ids]
    for owner, name in changed:
        setattr(owner, name, ids[_modality(name)])
    notes = tuple(
        f"the configuration sets no {name}: planned with {ids[_modality(name)]}, a free id of the vocabulary"
        for name in dict.fromkeys(stated)
        if _modality(name) in ids
    )
    return changed, notes


def _open_names(owner: Any) -> list[str]:
    return [name for name, value in vars(owner).items() if value is None and _PLACEHOLDER.match(name)]


def _modality(name: str) -> str:
    return name.partition("_")[0]


def _owners(model: nn.Module) -> list[Any]:
    """Every module, and every configuration of one."""
    configs = {id(c): c for m in model.modules() if hasattr(c := m.__dict__.get("config"), "to_dict")}
    return [*configs.values(), *model.modules()]


def _free_ids(config: Any, modalities: set[str]) -> dict[str, int]:
    """An id for each modality, from the end of the vocabulary; none where the vocabulary is not known."""
    size, taken = int(getattr(text_config(config), "vocab_size", 0) or 0), special_ids(config)
    free = (token for token in range(size - 1, 0, -1) if token not in taken)
    return dict(zip(sorted(modalities), free))
