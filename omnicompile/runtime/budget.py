"""Fill a batch up to the budget that the graph was captured for.

What is missing is filled by a padding segment at the end of the last row: text tokens, and dummy items with their
placeholder tokens: one image for all missing patches, and one for each item of fixed size. Attention is causal and
images attend to themselves only, so nothing before the padding sees it, and its labels are ignored: it changes neither
the loss nor a gradient. So every rank runs the same graph, and issues the same collectives, also when its batch has no
image at all.

Where whole images are dealt out to the ranks of a group (layout "images"), each of them has an equal part of the
patches, and one dummy image for what is missing from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omnicompile.anchors.masks import positions_restart
from omnicompile.capture.inputs.facts import Facts, first_value
from omnicompile.capture.inputs.types import Placeholder
from omnicompile.errors import CaptureError, InputError
from omnicompile.runtime.fixed_items import FixedItems, fixed_items, placeholders
from omnicompile.runtime.packing import Dealing, pack, with_spans

IGNORE = -100
_PIXELS, _GRID, _KINDS = "pixel_values", "image_grid_thw", "mm_token_type_ids"


@dataclass(frozen=True)
class PackedImages:
    """Images given as rows of patches with their grids. patches: of the budget. width: values per patch. merge: patches
    per side that become one token. token: id of the placeholder. dtype / kinds_dtype: of the patches, and of the tensor
    that marks placeholders in the text (None: there is none). pixels / grid: names of the batch's tensors."""

    patches: int
    width: int
    merge: int
    token: int
    dtype: torch.dtype
    kinds_dtype: torch.dtype | None = torch.int64
    pixels: str = _PIXELS
    grid: str = _GRID

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
    whole images are dealt out to. items: of fixed size. restarts: whether positions begin anew with each sample of a
    row; then they do so with the padding too, which is a sample of its own."""

    length: int | None
    images: PackedImages | None
    ranks: int = 1
    items: tuple[FixedItems, ...] = ()
    restarts: bool = False

    @staticmethod
    def of(model: nn.Module, example: Mapping[str, Any], ranks: int = 1) -> Budget:
        """The budget that `example` has. Raises InputError where its patches cannot be dealt out to `ranks` ranks."""
        ids = example.get("input_ids")
        length = ids.shape[1] if isinstance(ids, Tensor) and ids.dim() == 2 else None
        if length is None:
            return Budget(None, None)
        known, restarts = placeholders(model), positions_restart(example.get("position_ids"))
        images = _packed_images(model, example, known)
        items = fixed_items(example, known, () if images is None else (images.pixels,))
        if images is None:
            return Budget(length, None, items=items, restarts=restarts)
        unit = ranks * images.merge**2
        if images.patches % unit:
            raise InputError(
                f"layout 'images' over sp={ranks} deals out patches in parts that are multiples of {images.merge**2}, "
                f"but the budget has {images.patches}: make it {-(-images.patches // unit) * unit}"
            )
        return Budget(length, images, ranks, items, restarts)

    def fill(self, batch: Mapping[str, Any]) -> Filled:
        """`batch` at the size of the budget. Raises InputError when it is larger, leaves no room for the padding, or
        has images that cannot be dealt out."""
        filled = dict(batch)
        _check_mask(filled.get("attention_mask"))
        ids = filled.get("input_ids")
        if self.length is None or not isinstance(ids, Tensor):
            return Filled(filled)
        missing = 0 if self.images is None else self.images.patches - _rows(filled.get(self.images.pixels))
        room = self.length - ids.shape[1]
        for item in self.items:
            if item.missing(filled) < 0:
                raise InputError(
                    f"the batch has {_rows(filled[item.name])} items in {item.name}, the budget {item.count}: pack "
                    "less into a micro-batch, or plan a larger budget"
                )
        if room < 0 or missing < 0:
            raise InputError(
                f"the batch is {'longer' if room < 0 else 'larger in patches'} than the budget: {ids.shape[1]} of "
                f"{self.length} tokens, {missing} patches left: pack less into a micro-batch, or plan a larger budget"
            )
        if room:
            self._fill_text(filled, room)
        taken = self._fill_items(filled, room)
        if self.images is None:
            return Filled(filled)
        if self.ranks == 1:
            _fill_images(filled, self.images, [missing] if missing else [], room - taken, taken)
            return Filled(filled)
        return self._deal(filled, self.images, room - taken, taken)

    def _fill_items(self, batch: dict[str, Any], room: int) -> int:
        """Dummy items of fixed size at the end of the last row, one padding token before each. Returns how many of the
        `room` padding tokens they take."""
        taken = 0
        for item in self.items:
            missing = item.missing(batch)
            if not missing:
                continue
            need = missing * (item.tokens + 1)
            if taken + need > room:
                raise InputError(
                    f"{missing} items of {item.name} are missing from the budget, whose {need} tokens do not fit into "
                    f"the {room - taken} left: leave room for {item.tokens + 1} tokens for each that may be missing"
                )
            batch[item.name] = item.extended(batch.get(item.name), missing)
            batch["input_ids"] = _with_tail(batch["input_ids"], [item.tokens] * missing, item.token, taken)
            if _KINDS in batch:
                batch[_KINDS] = _with_tail(batch[_KINDS], [item.tokens] * missing, item.kind, taken)
            taken += need
        return taken

    def _deal(self, batch: dict[str, Any], images: PackedImages, room: int, taken: int) -> Filled:
        """Fill up each rank's part."""
        grid = batch.get(images.grid)
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
        _fill_images(batch, images, missing, room, taken)
        return Filled(batch, Dealing.of(by_rank, [*sizes, *missing]))

    def dealt(self, filled: Filled) -> dict[str, Any]:
        """The batch as the encoder takes it: images in the order of the ranks that work on them."""
        assert filled.dealing is not None and self.images is not None
        batch = filled.dealing.dealt(filled.batch, self.images.pixels, self.images.grid)
        if _KINDS not in batch:
            return batch
        lengths = [self.images.tokens(filled.dealing.sizes[image]) for image in filled.dealing.order]
        return with_spans(batch, lengths, "input_ids", _KINDS, self.images.token)

    def _fill_text(self, batch: dict[str, Any], room: int) -> None:
        """Lengthen everything that runs along the tokens."""
        rows, length = batch["input_ids"].shape
        fills = {"labels": IGNORE, "attention_mask": 1}
        items = {item.name for item in self.items}
        for name, value in batch.items():
            if not isinstance(value, Tensor) or value.is_floating_point() or value.shape[-1:] != (length,):
                continue
            if name in items:
                continue
            if name == "position_ids":
                batch[name] = torch.cat([value, self._positions_after(value, room)], -1)
            elif value.dim() == 2 and value.shape[0] == rows:
                tail = value.new_full((rows, room), fills.get(name, 0))
                batch[name] = torch.cat([value, tail], -1)

    def _positions_after(self, value: Tensor, room: int) -> Tensor:
        """[..., room]: positions of padding after `value` [..., tokens]. In packed rows it is a sample of its own, of
        which a last sample of one token is taken for the beginning; otherwise positions go on."""
        further, last = torch.arange(room).expand(*value.shape[:-1], room), value[..., -1:]
        running = last if value.dim() == 2 else last[:1]
        return torch.where(running * self.restarts > 0, further, last + 1 + further)


def _packed_images(
    model: nn.Module, example: Mapping[str, Any], known: Mapping[str, Placeholder]
) -> PackedImages | None:
    """The images of `example`, if they are packed."""
    for name, placeholder in known.items():
        if placeholder.grid and placeholder.grid in example:
            values: Tensor = example[name]
            return PackedImages(
                values.shape[0], values.shape[1], placeholder.merge, placeholder.token, values.dtype, None, name,
                placeholder.grid,
            )  # fmt: skip
    pixels = example.get(_PIXELS)
    if not isinstance(pixels, Tensor) or _GRID not in example or pixels.dim() != 2:
        return None
    facts = Facts.of(model)
    merge, token = first_value(facts.image_configs, "spatial_merge_size", "merge_size"), known.get(_PIXELS)
    if merge is None or token is None:
        raise CaptureError("the configuration names no image placeholder token, so batches cannot be filled up")
    kinds = example[_KINDS].dtype if _KINDS in example else torch.int64
    return PackedImages(pixels.shape[0], pixels.shape[1], int(merge), token.token, pixels.dtype, kinds)


def _rows(value: Any) -> int:
    return value.shape[0] if isinstance(value, Tensor) else 0


def _fill_images(batch: dict[str, Any], images: PackedImages, missing: list[int], room: int, taken: int) -> None:
    """Dummy images of `missing` patches at the end of the last row, where `room` padding tokens already are before
    `taken` others; one padding token before each."""
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
    grid, have = batch.get(images.grid), batch.get(images.pixels)
    batch[images.grid] = grids if grid is None else torch.cat([grid.cpu(), grids])
    batch[images.pixels] = pixels if have is None else torch.cat([have, pixels.to(have.device, have.dtype)])
    batch["input_ids"] = _with_tail(batch["input_ids"], counts, images.token, taken)
    if images.kinds_dtype is None:
        return
    kinds = batch.get(_KINDS)
    kinds = torch.zeros_like(batch["input_ids"], dtype=images.kinds_dtype) if kinds is None else kinds
    batch[_KINDS] = _with_tail(kinds, counts, 1, taken)


def _with_tail(value: Tensor, counts: list[int], fill: int, taken: int = 0) -> Tensor:
    """The last values of the last row but for `taken` set to `fill`, in runs of `counts` with one left alone between
    them."""
    value, end = value.clone(), value.shape[1] - taken
    for count in reversed(counts):
        value[-1, end - count : end] = fill
        end -= count + 1
    return value


def _check_mask(mask: Any) -> None:
    """Attention is causal within a row: only padding at the end of a row leaves it alone."""
    if isinstance(mask, Tensor) and mask.dim() == 2 and bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise InputError("attention_mask hides tokens before others that it shows: pad on the right, not on the left")
