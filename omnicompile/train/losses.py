"""Losses that a model gives beside the one it is trained with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def named_losses(output: Any) -> dict[str, Tensor]:
    """Scalars that a model's output names: the mapping `losses`, or entries called "<something>_loss"."""
    given = _get(output, "losses")
    if isinstance(given, Mapping):
        found = dict(given)
    elif isinstance(output, Mapping):
        found = {name.removesuffix("_loss"): value for name, value in output.items() if name.endswith("_loss")}
    else:
        found = {}
    return {n: v.detach() for n, v in found.items() if isinstance(v, Tensor) and v.numel() == 1}


def _get(output: Any, name: str) -> Any:
    if isinstance(output, Mapping):
        return output.get(name)
    return vars(output).get(name) if hasattr(output, "__dict__") else None


def means(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
    """Of the losses that every micro-step gave."""
    everyone = list(parts)
    names = [name for name in (everyone[0] if everyone else {}) if all(name in part for part in everyone)]
    if not names:
        return {}
    rows = torch.stack([torch.stack([part[name].float() for part in everyone]).mean() for name in names])
    return dict(zip(names, rows.tolist()))
