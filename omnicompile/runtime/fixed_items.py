"""Items of one size in a batch: images of fixed size, clips of sound or video, codes of images to produce."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omnicompile.capture.inputs.facts import Facts, placeholder_id
from omnicompile.capture.inputs.types import Placeholder, StatesInputs
from omnicompile.capture.inputs.vision import PIXELS
from omnicompile.errors import CaptureError

_SOUNDS = ("input_features", "input_values", "audio_values")
_VIDEOS = ("pixel_values_videos",)
_ITEM_DIMS = 4  # of a batch of images; less are rows of patches


@dataclass(frozen=True)
class FixedItems:
    """name: of the batch's tensor. count: of items in the budget. shape: of one. tokens: placeholders `token` that one
    takes in the text. kind: what marks these in `mm_token_type_ids`."""

    name: str
    count: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    token: int
    tokens: int
    kind: int = 1

    @staticmethod
    def of(name: str, count: int, item: Tensor, token: int, tokens: int) -> FixedItems:
        """item: one of them."""
        kind = 3 if name in _SOUNDS else 2 if name in _VIDEOS else 1
        return FixedItems(name, count, tuple(item.shape), item.dtype, token, tokens, kind)

    def missing(self, batch: Mapping[str, Any]) -> int:
        """How many items `batch` has less than the budget; negative: more."""
        value = batch.get(self.name)
        return self.count - (value.shape[0] if isinstance(value, Tensor) else 0)

    def extended(self, value: Tensor | None, missing: int) -> Tensor:
        """`value` [items, *shape], or nothing, with `missing` items of zeros more."""
        zeros = torch.zeros((missing, *self.shape), dtype=self.dtype)
        return zeros if value is None else torch.cat([value, zeros.to(value.device, value.dtype)])


def placeholders(model: nn.Module) -> Mapping[str, Placeholder]:
    """The batch's tensors that hold items -> what stands for them in the text, as far as the model says."""
    if isinstance(model, StatesInputs):
        return model.placeholders()
    try:
        facts = Facts.of(model)
    except CaptureError:  # a model without a Hugging Face configuration
        return {}
    found: dict[str, Placeholder] = {}
    for modality, names in (("image", PIXELS), ("audio", _SOUNDS), ("video", _VIDEOS)):
        token = placeholder_id(facts, modality)
        if token is not None:
            found |= {name: Placeholder(token) for name in names}
    return found


def fixed_items(
    example: Mapping[str, Any], known: Mapping[str, Placeholder], packed: Collection[str]
) -> tuple[FixedItems, ...]:
    """The items of `example` that have one size, each with the same number of placeholders. Not those that the batch
    says more of in other tensors with a row for each (sizes of images, say): these cannot be made up."""
    ids = example["input_ids"]
    text = {"input_ids", "labels", "attention_mask", "position_ids"} | {p.grid for p in known.values()}
    described = {n: v for n, v in example.items() if isinstance(v, Tensor) and n not in {*text, *known}}
    found = []
    for name, placeholder in known.items():
        values = example.get(name)
        if not isinstance(values, Tensor) or name in packed or values.dim() < 2 or placeholder.grid in example:
            continue
        if name in (*PIXELS, *_VIDEOS) and values.dim() < _ITEM_DIMS:
            continue
        count, total = values.shape[0], int((ids == placeholder.token).sum())
        if not count or not total or total % count:
            continue
        if any(
            not v.is_floating_point() and v.shape[:1] == (count,) and v.shape != ids.shape for v in described.values()
        ):
            continue
        found.append(FixedItems.of(name, count, values[0], placeholder.token, total // count))
    return tuple(found)
