"""What the parts of an omni-modal model share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from omnicompile.errors import InputError
from omnicompile.omni.classes import find_class
from omnicompile.omni.config import PROJECTORS, PartConfig
from omnicompile.torch_compat import new_fake_mode


class ModalityPart(PreTrainedModel):
    """A modality's module. Encoders and decoders implement `lm_encode`; decoders also `lm_head`, `lm_embed` and
    `lm_generate`."""

    config: PartConfig
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def lm_encode(self, values: Tensor, grid: Tensor | None = None) -> Any:
        """What takes the places of this modality's placeholders in the language model's input."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> ModalityPart:
        """A frozen tower stays as it is used: its norms keep their statistics, and nothing is dropped."""
        super().train(mode)
        if self.config.freeze != "none":
            self.get_submodule("tower").eval()
        return self

    def freeze(self) -> None:
        """Switch off gradients as the configuration says; the tower is called `tower`."""
        if self.config.freeze == "all":
            self.requires_grad_(False)
        elif self.config.freeze == "tower":
            self.get_submodule("tower").requires_grad_(False)


def make_tower(config: PartConfig) -> PreTrainedModel:
    """Raises InputError where the class refuses its configuration."""
    cls = find_class(config.tower_class, config.name)
    try:
        return cls(config.tower, **(config.arguments or {}))
    except (TypeError, ValueError) as error:
        first = str(error).strip().splitlines()[:1]
        raise InputError(f"{config.name}: {config.tower_class} cannot be built: {''.join(first)}") from error


def make_projector(kind: str, width: int, hidden: int, where: str) -> nn.Module:
    """From features of `width` to `hidden`, the width of the language model."""
    if kind == "mlp":
        return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
    if kind == "linear":
        return nn.Linear(width, hidden)
    if kind != "none":
        raise InputError(f"{where}: the projector must be one of {', '.join(PROJECTORS)}, got {kind!r}")
    if width != hidden:
        raise InputError(
            f"{where}: features of width {width} do not match the language model's {hidden}: use projector mlp or "
            "linear"
        )
    return nn.Identity()


def follow(output: Any, path: str, where: str) -> Any:
    """The value at a dotted path of attributes, keys or indices. Raises InputError naming what there is instead."""
    for step in path.split("."):
        try:
            output = output[int(step)] if step.isdigit() else getattr(output, step)
        except (AttributeError, IndexError, KeyError) as error:
            there = ", ".join(output.keys()) if hasattr(output, "keys") else type(output).__name__
            raise InputError(f"{where}: the tower's output has no {path} (it has {there})") from error
    return output


def fake_shape(part: ModalityPart, shape: tuple[int, ...]) -> Tensor:
    """What `part.lm_encode` makes of one item of this shape, without computing anything."""
    mode = new_fake_mode()
    with mode, torch.no_grad():
        item = torch.empty((1, *shape), dtype=part.dtype, device=part.device)
    with torch.no_grad(), mode:
        result = part.lm_encode(item)
    return result if isinstance(result, Tensor) else result[0]


def hidden_size(foundation: PretrainedConfig) -> int:
    return int(foundation.get_text_config().hidden_size)
