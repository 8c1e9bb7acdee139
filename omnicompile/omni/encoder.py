"""Encoders: a model of transformers, adapted by declaration, and a projector into the language model."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import Tensor

from omnicompile.errors import InputError
from omnicompile.omni.classes import size_of
from omnicompile.omni.config import EncoderConfig
from omnicompile.omni.parts import ModalityPart, fake_shape, follow, make_projector, make_tower


class Encoder(ModalityPart):
    """Raw values of a modality -> embeddings for the language model, of width `hidden`."""

    config: EncoderConfig
    config_class = EncoderConfig

    def __init__(self, config: EncoderConfig, hidden: int) -> None:
        super().__init__(config)
        where = f"encoder {config.name}"
        self.width = size_of(config.width, config.tower, where)
        self.tower = make_tower(config)
        self.projector = make_projector(config.projector, self.width * config.stack, hidden, where)
        self.post_init()

    def lm_encode(self, values: Tensor, grid: Tensor | None = None) -> Tensor:
        """values: [items, *shape of one], or [patches, values of a patch] with grid [items, 3] where items are packed.
        Returns [tokens of all items, hidden], items in order.

        Raises InputError where the tower's features are not of the declared width.
        """
        config = self.config
        if config.packed is None:
            output = self.tower(values)
        elif grid is None:
            raise InputError(f"encoder {config.name} takes packed items: give {config.name}_grid_thw beside the values")
        else:
            output = self.tower(values, **{str(config.packed["argument"]): grid})
        features: Tensor = follow(output, config.output, f"encoder {config.name}")
        if features.shape[-1] != self.width:
            raise InputError(
                f"encoder {config.name}: its features are {features.shape[-1]} wide, the projector takes {self.width}: "
                "set width to the field of its configuration that says how wide they are"
            )
        if config.stack > 1:
            features = self._stacked(features)
        return self.projector(features.flatten(0, -2))

    def _stacked(self, features: Tensor) -> Tensor:
        tokens, stack = features.shape[-2], self.config.stack
        if tokens % stack:
            raise InputError(f"encoder {self.config.name}: {tokens} features cannot be stacked by {stack}")
        return features.unflatten(-2, (tokens // stack, stack)).flatten(-2)

    @cached_property
    def item_shape(self) -> tuple[int, ...]:
        """Of one item, where items are not packed."""
        config = self.config
        return tuple(size_of(size, config.tower, f"encoder {config.name}") for size in config.input or [])

    @cached_property
    def item_tokens(self) -> int:
        """Placeholders that one item takes, where items are not packed."""
        return int(fake_shape(self, self.item_shape).shape[0])

    def packing(self) -> dict[str, int]:
        """The sizes of `packed`, as numbers."""
        config = self.config
        sizes = {k: v for k, v in (config.packed or {}).items() if k != "argument"}
        return {name: size_of(value, config.tower, f"encoder {config.name}") for name, value in sizes.items()}

    def tokens_of(self, grid: Any) -> int:
        """Placeholders of one packed item of `grid` (frames, height, width) in patches."""
        frames, height, width = (int(n) for n in grid)
        return frames * height * width // self.packing()["merge"] ** 2
