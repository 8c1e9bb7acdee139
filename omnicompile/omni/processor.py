"""From text, images, sounds and whatever else a model reads or produces to the arguments of its forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from omnicompile.errors import InputError
from omnicompile.omni.config import OmniConfig
from omnicompile.omni.decoder import DiscreteDecoder
from omnicompile.omni.encoder import Encoder
from omnicompile.omni.model import OmniModel

IGNORE = -100


@dataclass(frozen=True)
class Text:
    """trained: whether its tokens are targets."""

    text: str
    trained: bool = True


@dataclass(frozen=True)
class Item:
    """An item of the modality `name`. values: float, [*shape of one item], where items are packed [frames, channels,
    height, width] or [channels, height, width]. produced: of a decoder, whose codes are targets; otherwise of an
    encoder."""

    name: str
    values: Tensor
    produced: bool = False


@dataclass
class _Row:
    ids: list[int]
    labels: list[int]


class OmniProcessor:
    """Puts samples into sequences: the tokens of text, and for each item start token, placeholders and end token."""

    def __init__(self, model: OmniModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises InputError where the tokenizer lacks a special token of the model, or gives it another id."""
        self.model, self.tokenizer = model, tokenizer
        vocabulary = tokenizer.get_vocab()
        for token, number in (model.config.special_tokens or {}).items():
            if vocabulary.get(token) != number:
                have = f"has {vocabulary[token]} for it" if token in vocabulary else "has no such token"
                raise InputError(
                    f"the model's id of {token} is {number}, and the tokenizer {have}: add the special tokens to the "
                    "tokenizer, and read the configuration with it"
                )

    def __call__(self, samples: Sequence[Sequence[Text | Item]]) -> dict[str, Tensor]:
        """One row for all samples, one after the other. Returns input_ids, labels and position_ids [1, tokens], and the
        values of all items. Positions begin anew with each sample, so that none attends to another, and its first token
        is nobody's target. Raises InputError for an item that no part takes or of another shape."""
        row = _Row([], [])
        values: dict[str, list[Tensor]] = {}
        positions: list[int] = []
        for sample in samples:
            start = len(row.ids)
            for part in sample:
                if isinstance(part, Text):
                    ids = self.tokenizer(part.text, add_special_tokens=False)["input_ids"]
                    row.ids += ids
                    row.labels += ids if part.trained else [IGNORE] * len(ids)
                else:
                    self._add_item(row, part, values)
            positions += range(len(row.ids) - start)
            row.labels[start : start + 1] = [IGNORE] * (len(row.ids) > start)
        batch = {
            "input_ids": torch.tensor([row.ids]),
            "labels": torch.tensor([row.labels]),
            "position_ids": torch.tensor([positions]),
        }
        for name, items in values.items():
            packed = name.endswith("_grid_thw") or self._is_packed(name.removesuffix("_values"))
            batch[name] = torch.cat(items) if packed else torch.stack(items)
        return batch

    def save_pretrained(self, folder: str | Path) -> None:
        """Beside the model's own files: the tokenizer is all that a processor has besides the model."""
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: OmniModel | None = None) -> OmniProcessor:
        """Of a folder that model and processor were saved to. model: of the same configuration, where there is one
        already; without it one is made that has no weights.

        Raises InputError for a folder without a tokenizer, or with one of another model.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise InputError(f"{folder} holds no tokenizer: save the processor there beside the model") from error
        if model is None:
            config = OmniConfig.from_pretrained(folder)
            with torch.device("meta"):
                model = OmniModel(config)
        return cls(model, tokenizer)

    def _is_packed(self, name: str) -> bool:
        return name in (self.model.config.encoders or []) and self.model.encoder(name).config.packed is not None

    def _add_item(self, row: _Row, item: Item, values: dict[str, list[Tensor]]) -> None:
        part: Encoder | DiscreteDecoder
        part = self.model.decoder(item.name) if item.produced else self.model.encoder(item.name)
        if isinstance(part, Encoder) and part.config.packed is not None:
            patches, grid = patchify(item.values, part.packing(), item.name)
            values.setdefault(f"{item.name}_values", []).append(patches)
            values.setdefault(f"{item.name}_grid_thw", []).append(grid)
            count = part.tokens_of(grid[0])
        else:
            if tuple(item.values.shape) != part.item_shape:
                raise InputError(
                    f"an item of {item.name} has shape {list(item.values.shape)}, the model takes "
                    f"{list(part.item_shape)}"
                )
            key = f"output_{item.name}_values" if item.produced else f"{item.name}_values"
            values.setdefault(key, []).append(item.values)
            count = part.item_tokens
        config = part.config
        row.ids += [config.start_token_id, *[config.token_id] * count, config.end_token_id]
        if item.produced:
            row.labels += row.ids[len(row.labels) :]
        else:
            row.labels += [IGNORE] * (count + 2)


def patchify(values: Tensor, sizes: dict[str, int], name: str) -> tuple[Tensor, Tensor]:
    """An image [channels, height, width] or video [frames, channels, height, width] -> patches [n, values of one] and
    their grid [1, 3]. Patches that are merged into one token are neighbours; an image
    is repeated to the frames of a patch. Raises InputError where the sides do not divide."""
    video = values if values.dim() == 4 else values[None]
    patch, merge, temporal = sizes["patch"], sizes["merge"], sizes["temporal"]
    if short := -video.shape[0] % temporal:
        video = torch.cat([video, video[-1:].expand(short, -1, -1, -1)])
    frames, channels, height, width = video.shape
    if height % (patch * merge) or width % (patch * merge):
        raise InputError(f"{name} of {height} x {width} pixels: both sides must be multiples of {patch * merge}")
    t, h, w = frames // temporal, height // patch // merge, width // patch // merge
    cut = video.reshape(t, temporal, channels, h, merge, patch, w, merge, patch)
    cut = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return cut.reshape(t * h * w * merge**2, -1), torch.tensor([[t, h * merge, w * merge]])
