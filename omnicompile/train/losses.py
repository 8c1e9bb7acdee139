"""Losses that a model gives beside the one it is trained with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def named_losses(output: Any) -> dict[str, float]:
    """Scalars called "<something>_loss" in a model's output, such as those of its modalities."""
    if not isinstance(output, Mapping):
        return {}
    return {
        name.removesuffix("_loss"): float(value.detach())
        for name, value in output.items()
        if name.endswith("_loss") and isinstance(value, Tensor) and value.numel() == 1
    }
