"""Fill a batch up to the budget that the graph was captured for.

What is missing is filled by a padding segment at the end of the last row: text tokens, and one dummy image with its
placeholder tokens. Attention is causal and images attend to themselves only, so nothing before the padding sees it, and
its labels are ignored: it changes neither the loss nor a gradient. So every rank runs the same graph, and issues the
same collectives, also when its batch has no image at all.

Where whole images are dealt out to the ranks of a group (layout "images"), each of them has an equal part of the
patches, and one dummy image for what is missing from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omnicompile.capture.inputs.facts import Facts, first_value, placeholder_id
from omnicompile.errors import CaptureError, InputError
from omnicompile.runtime.packing import Dealing, pack, with_spans

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
class Filled:
    """A batch at the size of the budget. dealing: which images the ranks of a group work on; None where none are dealt
    out."""

    batch: dict[str, Any]
    dealing: Dealing | None = None


@dataclass(frozen=True)
class Budget:
    """What every micro-batch is filled up to. length: tokens per row. images: None without packed images. ranks: that
    whole images are dealt out to."""

    length: int | None
    images: PackedImages | None
    ranks: int = 1

    @staticmethod
    def of(model: nn.Module, example: Mapping[str, Any], ranks: int = 1) -> Budget:
        """The budget that `example` has. Raises InputError where its patches cannot be dealt out to `ranks` ranks."""
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
        unit = ranks * int(merge) ** 2
        if pixels.shape[0] % unit:
            raise InputError(
                f"layout 'images' over sp={ranks} deals out patches in parts that are multiples of {int(merge) ** 2}, "
                f"but the budget has {pixels.shape[0]}: make it {-(-pixels.shape[0] // unit) * unit}"
            )
        images = PackedImages(pixels.shape[0], pixels.shape[1], int(merge), token, pixels.dtype, kinds)
        return Budget(length, images, ranks)

    def fill(self, batch: Mapping[str, Any]) -> Filled:
        """`batch` at the size of the budget. Raises InputError when it is larger, leaves no room for the padding, or
        has images that cannot be dealt out."""
        filled = dict(batch)
        _check_mask(filled.get("attention_mask"))
        ids = filled.get("input_ids")
        if self.length is None or not isinstance(ids, Tensor):
            return Filled(filled)
        missing = 0 if self.images is None else self.images.patches - _rows(filled.get(_PIXELS))
        room = self.length - ids.shape[1]
        if room < 0 or missing < 0:
            raise InputError(
                f"the batch is {'longer' if room < 0 else 'larger in patches'} than the budget: {ids.shape[1]} of "
                f"{self.length} tokens, {missing} patches left: pack less into a micro-batch, or plan a larger budget"
            )
        if room:
            self._fill_text(filled, room)
        if self.images is None:
            return Filled(filled)
        if self.ranks == 1:
            _fill_images(filled, self.images, [missing] if missing else [], room)
            return Filled(filled)
        return self._deal(filled, self.images, room)

    def _deal(self, batch: dict[str, Any], images: PackedImages, room: int) -> Filled:
        """Fill up each rank's part."""
        grid = batch.get(_GRID)
        sizes = [] if grid is None else grid.prod(-1).tolist()
        capacity = images.patches // self.ranks
        by_rank = pack(sizes, self.ranks, capacity)
        if by_rank is None:
            largest = max(sizes)
            why = f"one has {largest}" if largest > capacity else f"they have {', '.join(map(str, sizes))}"
            raise InputError(
                f"layout 'images' deals whole images out to {self.ranks} ranks with room for {capacity} patches each, "
                f"but the images of this batch do not fit ({why}): plan a larger budget of patches, or use layout "
                "'sequence'"
            )
        missing = [capacity - sum(sizes[image] for image in mine) for mine in by_rank]
        dummies = iter(range(len(sizes), len(sizes) + self.ranks))
        by_rank = [[*mine, next(dummies)] if short else mine for mine, short in zip(by_rank, missing)]
        missing = [short for short in missing if short]
        _fill_images(batch, images, missing, room)
        return Filled(batch, Dealing.of(by_rank, [*sizes, *missing]))

    def dealt(self, filled: Filled) -> dict[str, Any]:
        """The batch as the encoder takes it: images in the order of the ranks that work on them."""
        assert filled.dealing is not None and self.images is not None
        batch = filled.dealing.dealt(filled.batch, _PIXELS, _GRID)
        if _KINDS not in batch:
            return batch
        lengths = [self.images.tokens(filled.dealing.sizes[image]) for image in filled.dealing.order]
        return with_spans(batch, lengths, "input_ids", _KINDS, self.images.token)

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


def _fill_images(batch: dict[str, Any], images: PackedImages, missing: list[int], room: int) -> None:
    """Dummy images of `missing` patches at the end of the last row, where `room` padding tokens already are; one
    padding token before each."""
    counts = [images.tokens(patches) for patches in missing]
    if not missing:
        return
    if sum(counts) + len(counts) > room:
        parts = "" if len(missing) == 1 else f" in {len(missing)} parts"
        raise InputError(
            f"{sum(missing)} patches of the budget are left{parts}, whose {sum(counts)} dummy tokens do not fit into "
            f"the {room} tokens left: leave room for one token for every {images.merge**2} patches that are missing, "
            f"and {'one' if len(missing) == 1 else len(missing)} more"
        )
    grids = torch.tensor([[1, *images.dummy_grid(patches)] for patches in missing], dtype=torch.int64)
    pixels = torch.zeros(sum(missing), images.width, dtype=images.dtype)
    batch[_GRID] = torch.cat([batch[_GRID].cpu(), grids]) if batch.get(_GRID) is not None else grids
    have = batch.get(_PIXELS)
    batch[_PIXELS] = pixels if have is None else torch.cat([have, pixels.to(have.device, have.dtype)])
    batch["input_ids"] = _with_tail(batch["input_ids"], counts, images.token)
    kinds = batch.get(_KINDS)
    kinds = torch.zeros_like(batch["input_ids"], dtype=images.kinds_dtype) if kinds is None else kinds
    batch[_KINDS] = _with_tail(kinds, counts, 1)


def _with_tail(value: Tensor, counts: list[int], fill: int) -> Tensor:
    """The last values of the last row set to `fill`, in runs of `counts` with one left alone between them."""
    value, end = value.clone(), value.shape[1]
    for count in reversed(counts):
        value[-1, end - count : end] = fill
        end -= count + 1
    return value


def _check_mask(mask: Any) -> None:
    """Attention is causal within a row: only padding at the end of a row leaves it alone."""
    if isinstance(mask, Tensor) and mask.dim() == 2 and bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise InputError("attention_mask hides tokens before others that it shows: pad on the right, not on the left")
