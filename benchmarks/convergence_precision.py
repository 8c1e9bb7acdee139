"""Models that compute in float64 throughout.

Models of transformers are written for 16 bit: norms, softmax and losses are computed in float32, whatever the weights
are in. Of float64 weights that would leave rounding of 1e-7 in every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class NothingInFloat32(TorchFunctionMode):
    """While active, what would turn a float64 tensor into a float32 one leaves it in float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype is torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            args = tuple(_wide(value) for value in args)
            given = {name: _wide(value) for name, value in given.items()}
        return func(*args, **given)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def in_dtype(batch: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The batch with its float values in `dtype`."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
