"""Losses that a model gives beside the one it is trained with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from omnicompile.runtime.parallel_module import Output


def named_losses(output: Any) -> dict[str, Tensor]:
    """The mapping `losses` of a model's output, by name (of its modalities, say)."""
    if isinstance(output, Output):
        found: Any = output.losses
    else:
        found = output.get("losses") if isinstance(output, Mapping) else None
    if not isinstance(found, Mapping):
        return {}
    return {n: v.detach() for n, v in found.items() if isinstance(v, Tensor) and v.numel() == 1}


def joined(parts: Iterable[Mapping[str, Tensor]], shares: bool) -> dict[str, float]:
    """Of the losses that every part gave: their sum if each is a share of the whole, otherwise their mean."""
    everyone = list(parts)
    names = [name for name in (everyone[0] if everyone else {}) if all(name in part for part in everyone)]
    if not names:
        return {}
    rows = torch.stack([torch.stack([part[name].float() for part in everyone]).sum() for name in names])
    return dict(zip(names, (rows if shares else rows / len(everyone)).tolist()))
