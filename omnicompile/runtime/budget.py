"""Fill a batch up to the budget that the graph was captured for.

What is missing is filled by a padding segment at the end of the last row: text tokens, and one dummy image with its
placeholder tokens. Attention is causal and images attend to themselves only, so nothing before the padding sees it, and
its labels are ignored: it changes neither the loss nor a gradient. So every rank runs the same graph, and issues the
same collectives, also when its batch has no image at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omnicompile.capture.inputs.facts import Facts, first_value, placeholder_id
from omnicompile.errors import CaptureError, InputError

IGNORE = -100
_PIXELS, _GRID, _KINDS = "pixel_values", "image_grid_thw", "mm_token_type_ids"


@dataclass(frozen=True)
class PackedImages:
    """Images given as rows of patches with their grids. patches: of the budget. width: values per patch. merge: patches
    per side that become one token. token: id of the placeholder. dtype / kinds_dtype: of the patches, and of the tensor
    that marks placeholders in the text."""

    patches: int
    width: int
    merge: int
    token: int
    dtype: torch.dtype
    kinds_dtype: torch.dtype = torch.int64

    def tokens(self, patches: int) -> int:
        return patches // self.merge**2

    def dummy_grid(self, patches: int) -> tuple[int, int]:
        """(height, width) of one image of `patches` patches, as square as the number allows."""
        m = self.merge
        if patches % (m * m):
            raise InputError(f"the batch leaves {patches} patches of the budget, not a multiple of {m * m}")
        units = patches // (m * m)
        height = next(h for h in range(int(units**0.5), 0, -1) if units % h == 0)
        return height * m, units // height * m


@dataclass(frozen=True)
class Budget:
    """What every micro-batch is filled up to. length: tokens per row. images: None without packed images."""

    length: int | None
    images: PackedImages | None

    @staticmethod
    def of(model: nn.Module, example: Mapping[str, Any]) -> Budget:
        """The budget that `example` has."""
        ids = example.get("input_ids")
        length = ids.shape[1] if isinstance(ids, Tensor) and ids.dim() == 2 else None
        pixels = example.get(_PIXELS)
        if length is None or not isinstance(pixels, Tensor) or _GRID not in example or pixels.dim() != 2:
            return Budget(length, None)
        facts = Facts.of(model)
        merge = first_value(facts.image_configs, "spatial_merge_size", "merge_size")
        token = placeholder_id(facts, "image")
        if merge is None or token is None:
            raise CaptureError("the configuration names no image placeholder token, so batches cannot be filled up")
        kinds = example[_KINDS].dtype if _KINDS in example else torch.int64
        return Budget(length, PackedImages(pixels.shape[0], pixels.shape[1], int(merge), token, pixels.dtype, kinds))

    def fill(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """`batch` at the size of the budget. Raises InputError when it is larger, or leaves no room for the padding."""
        filled = dict(batch)
        _check_mask(filled.get("attention_mask"))
        ids = filled.get("input_ids")
        if self.length is None or not isinstance(ids, Tensor):
            return filled
        missing = 0 if self.images is None else self.images.patches - _rows(filled.get(_PIXELS))
        room = self.length - ids.shape[1]
        if room < 0 or missing < 0:
            raise InputError(
                f"the batch is {'longer' if room < 0 else 'larger in patches'} than the budget: {ids.shape[1]} of "
                f"{self.length} tokens, {missing} patches left: pack less into a micro-batch, or plan a larger budget"
            )
        if room:
            self._fill_text(filled, room)
        if missing and self.images is not None:
            _fill_images(filled, self.images, missing, room)
        return filled

    def _fill_text(self, batch: dict[str, Any], room: int) -> None:
        """Lengthen everything that runs along the tokens."""
        rows, length = batch["input_ids"].shape
        fills = {"labels": IGNORE, "attention_mask": 1}
        for name, value in batch.items():
            if not isinstance(value, Tensor) or value.is_floating_point() or value.shape[-1:] != (length,):
                continue
            if name == "position_ids":
                last = value[..., -1:] + torch.arange(1, room + 1)
                batch[name] = torch.cat([value, last], -1)
            elif value.dim() == 2 and value.shape[0] == rows:
                tail = value.new_full((rows, room), fills.get(name, 0))
                batch[name] = torch.cat([value, tail], -1)


def _rows(value: Any) -> int:
    return value.shape[0] if isinstance(value, Tensor) else 0


def _fill_images(batch: dict[str, Any], images: PackedImages, missing: int, room: int) -> None:
    """One dummy image at the end of the last row, where `room` padding tokens already are."""
    tokens = images.tokens(missing)
    if tokens + 1 > room:
        raise InputError(
            f"{missing} patches of the budget are left, whose {tokens} dummy tokens do not fit into the {room} tokens "
            f"left: leave room for one token for every {images.merge**2} patches that are missing, and one more"
        )
    height, width = images.dummy_grid(missing)
    grid = torch.tensor([[1, height, width]], dtype=torch.int64)
    pixels = torch.zeros(missing, images.width, dtype=images.dtype)
    batch[_GRID] = torch.cat([batch[_GRID].cpu(), grid]) if batch.get(_GRID) is not None else grid
    have = batch.get(_PIXELS)
    batch[_PIXELS] = pixels if have is None else torch.cat([have, pixels.to(have.device, have.dtype)])
    batch["input_ids"] = _with_tail(batch["input_ids"], tokens, images.token)
    kinds = batch.get(_KINDS)
    kinds = torch.zeros_like(batch["input_ids"], dtype=images.kinds_dtype) if kinds is None else kinds
    batch[_KINDS] = _with_tail(kinds, tokens, 1)


def _with_tail(value: Tensor, count: int, fill: int) -> Tensor:
    """The last `count` values of the last row set to `fill`."""
    value = value.clone()
    value[-1, value.shape[1] - count :] = fill
    return value


def _check_mask(mask: Any) -> None:
    """Attention is causal within a row: only padding at the end of a row leaves it alone."""
    if isinstance(mask, Tensor) and mask.dim() == 2 and bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise InputError("attention_mask hides tokens before others that it shows: pad on the right, not on the left")
