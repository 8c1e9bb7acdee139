"""Operators that mark places in a traced graph and compute nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch import Tensor


@torch.library.custom_op("omnicompile::backward_starts", mutates_args=())
def backward_starts(x: Tensor) -> Tensor:
    """Marks the place in a joint graph where the forward ends. Returns a copy of `x`."""
    return x.clone()


@backward_starts.register_fake
def _backward_starts_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("omnicompile::repeated_layer", mutates_args=())
def repeated_layer(inputs: Sequence[Tensor], path: str, kind: int, outputs: str) -> list[Tensor]:
    """Stands for a call of the layer at `path`, which is of the already traced kind number `kind`.

    outputs: JSON list of [dtype, shape] of the results. Never executed.
    """
    raise RuntimeError(f"a repeated layer ({path}) was executed: this graph is for planning only")


@repeated_layer.register_fake
def _repeated_layer_fake(inputs: Sequence[Tensor], path: str, kind: int, outputs: str) -> list[Tensor]:
    device = inputs[0].device if inputs else "cpu"
    return [torch.empty(shape, dtype=_DTYPES[dtype], device=device) for dtype, shape in json.loads(outputs)]


_DTYPES = {str(d): d for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32,
                               torch.bool, torch.int16, torch.int8, torch.uint8)}  # fmt: skip
