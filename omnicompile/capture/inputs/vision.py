"""Image arguments, by the names that Hugging Face processors give them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnicompile.capture.inputs.facts import Facts, first_value, pair
from omnicompile.capture.inputs.types import FloatSpec, ImageConstraints

PIXELS = ("pixel_values", "image_pixel_values", "pixel_values_images", "flattened_patches", "image_patches")
GRIDS = ("image_grid_thw", "grid_thw", "image_grid_hw", "target_sizes", "spatial_shapes", "image_position_ids")
_EXTRA_MERGES = ("adapter_merge_size", "downsample_factor")
_VISION_PATH = re.compile(r"vision|visual|image|vit\b|encoder")


@dataclass(frozen=True)
class ImageFacts:
    """Numbers of the vision tower. size: (height, width) in pixels, None if the configuration states none."""

    pixels: str
    channels: int
    patch: int
    temporal: int
    merge: tuple[int, int]
    size: tuple[int, int] | None
    grid_argument: str | None


def image_facts(facts: Facts) -> ImageFacts | None:
    """None for a model that takes no images."""
    pixels = facts.first_argument(*PIXELS)
    if pixels is None or getattr(facts.config, "vision_config", "absent") is None:
        return None
    configs = facts.image_configs
    size = first_value(configs, "image_size", "force_image_size", "resolution", "img_size", "crop_size")
    patch = first_value(configs, "patch_size", "spatial_patch_size")
    merge = first_value(configs, "spatial_merge_size", "merge_kernel_size", "merge_size", "pooling_kernel_size")
    rows, cols = pair(merge or 1)
    # Some configurations call the merging itself by this name as well.
    extra = first_value((c for c in configs if not _same_field(c, "adapter_merge_size")), *_EXTRA_MERGES) or 1
    return ImageFacts(
        pixels=pixels,
        channels=int(first_value(configs, "in_channels", "num_channels", "in_chans") or 3),
        patch=pair(patch or 16)[0],
        temporal=int(first_value(configs, "temporal_patch_size", "patch_temporal") or 1),
        merge=(rows * int(extra), cols * int(extra)),
        size=pair(size) if size is not None else None,
        grid_argument=facts.first_argument(*GRIDS),
    )


def _same_field(config: Any, name: str) -> bool:
    """Whether `name` is only another name of a field of `config`."""
    return name in getattr(config, "attribute_map", {})


def image_constraints(facts: Facts) -> ImageConstraints | None:
    found = image_facts(facts)
    if found is None:
        return None
    if found.grid_argument is not None:
        return ImageConstraints(found.patch, multiple=found.merge, packed=True)
    if "image_sizes" in facts.arguments and not _has_fixed_positions(facts, found):
        return ImageConstraints(found.patch, multiple=found.merge)
    height, width = found.size or (_DEFAULT_SIZE, _DEFAULT_SIZE)
    native = (height // found.patch, width // found.patch)
    grid = _fitting(facts, native)
    note = ""
    if grid != native:
        taken = " x ".join(str(n * found.patch) for n in grid)
        note = f"patches of images of {height} x {width} pixels, as configured, cannot be merged: planned at {taken}"
    return ImageConstraints(found.patch, grid=grid, note=note)


_DEFAULT_SIZE = 512


def _fitting(facts: Facts, grid: tuple[int, int]) -> tuple[int, int]:
    """The grid nearest to `grid` that what follows the tower takes: sides that shuffling or pooling divides, and a
    number of patches that a table of known ones has."""
    factor = first_value(facts.image_configs, "downsample_factor", "scale_factor")
    if isinstance(factor, int) and factor > 1:
        rows, cols = (max(1, round(side / factor)) * factor if side % factor else side for side in grid)
        grid = (rows, cols)
    tables = (value for config in facts.image_configs for name, value in vars(config).items() if "patch_to" in name)
    known = next((sorted(int(n) for n in table) for table in tables if isinstance(table, dict) and table), None)
    if known is not None and grid[0] * grid[1] not in known:
        squares = [n for n in known if math.isqrt(n) ** 2 == n]
        if squares:
            side = math.isqrt(min(squares, key=lambda n: abs(n - grid[0] * grid[1])))
            grid = (side, side)
    return grid


def _has_fixed_positions(facts: Facts, found: ImageFacts) -> bool:
    """Whether the tower holds one learned position per patch of its native size, or is given tiles of it."""
    if first_value(facts.image_configs, "image_grid_pinpoints", "max_num_tiles") is not None:
        return True
    if found.size is None:
        return False
    patches = (found.size[0] // found.patch) * (found.size[1] // found.patch)
    lengths = {patches, patches + 1, patches + 2}
    return any(
        lengths & set(tensor.shape[:-1])
        for name, tensor in facts.model.named_parameters()
        if tensor.dim() in (2, 3) and "pos" in name and _VISION_PATH.search(name)
    )


def _long(rows: list[list[int]] | list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.long, device="cpu")


def _ones(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
    return torch.ones(shape, dtype=dtype, device="cpu")


def image_layouts(
    facts: Facts, images: int, grid: tuple[int, int], rows: int, seq_len: int
) -> Iterator[dict[str, Any]]:
    """Possible image arguments for `images` images of `grid` patches, most specific first. Names that the processors of
    several models share do not always mean one shape, so the caller tries one after the other."""
    found = image_facts(facts)
    assert found is not None
    if found.pixels == "flattened_patches":
        yield from _flattened(facts, found, images, grid, rows, seq_len)
    elif found.grid_argument == "spatial_shapes" or found.grid_argument == "image_position_ids":
        yield from _padded_patches(facts, found, images, grid)
    elif found.grid_argument is not None:
        yield from _packed(facts, found, images, grid)
    else:
        if "image_attention_mask" in facts.arguments and first_value(facts.image_configs, "crop_size") is not None:
            yield _crops(facts, found, images, grid)
        yield from _whole_images(facts, found, images, grid, rows, seq_len)


def _packed(facts: Facts, found: ImageFacts, images: int, grid: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """Patches of all images in one row, with the images' grids beside them."""
    p, c, t = found.patch, found.channels, found.temporal
    total = images * grid[0] * grid[1]
    assert found.grid_argument is not None
    two_columns = not found.grid_argument.endswith("thw")
    sizes = _long([list(grid) if two_columns else [1, *grid]] * images)
    common: dict[str, Any] = {found.grid_argument: sizes}
    if "image_merge_sizes" in facts.arguments:
        common["image_merge_sizes"] = _ones(images)
    shapes: list[tuple[int, ...]] = [(total, c * t * p * p), (total, c * p * p), (total, c, p, p), (total, c, t, p, p)]
    shapes += [(total, t, c, p, p), (1, total, c * p * p), (1, c, p, total * p), (total, t, p, p, c)]
    merged = total // (found.merge[0] * found.merge[1])
    shapes += [(count, p * found.merge[0], p * found.merge[1], c) for count in (merged, total)]
    if two_columns:
        shapes.reverse()
    for shape in dict.fromkeys(shapes):
        yield {found.pixels: FloatSpec(shape, facts.dtype), **common}


def _padded_patches(facts: Facts, found: ImageFacts, images: int, grid: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """Patches of each image in a row of its own, [images, patches, values of a patch]."""
    patches = grid[0] * grid[1]
    values = FloatSpec((images, patches, found.channels * found.patch**2), facts.dtype)
    result: dict[str, Any] = {found.pixels: values}
    if "spatial_shapes" in facts.arguments:
        result["spatial_shapes"] = _long([list(grid)] * images)
        result["pixel_attention_mask"] = _ones(images, patches)
    if "image_position_ids" in facts.arguments:
        y, x = torch.meshgrid(*(torch.arange(n, device="cpu") for n in grid), indexing="ij")
        result["image_position_ids"] = torch.stack([x, y], -1).reshape(1, patches, 2).repeat(images, 1, 1)
    yield result


def _flattened(
    facts: Facts, found: ImageFacts, images: int, grid: tuple[int, int], rows: int, seq_len: int
) -> Iterator[dict[str, Any]]:
    """[images, patches, 2 + values of a patch]: the row and column of each patch come first."""
    values = first_value(facts.image_configs, "patch_embed_hidden_size") or found.channels * found.patch**2
    spec = FloatSpec((images, grid[0] * grid[1], 2 + int(values)), facts.dtype)
    yield {found.pixels: spec, **_extras(facts, found, images, grid, rows, seq_len)}


def _tiles(facts: Facts, found: ImageFacts) -> tuple[int, tuple[int, int]] | None:
    """(tiles per image with the overview, image size in pixels) of the first resolution that a tiling model offers."""
    pinpoints = first_value(facts.image_configs, "image_grid_pinpoints")
    if not pinpoints or found.size is None:
        return None
    height, width = pair(pinpoints[0])
    tiles = -(-height // found.size[0]) * -(-width // found.size[1])
    return tiles + 1, (height, width)


def _crops(facts: Facts, found: ImageFacts, images: int, grid: tuple[int, int]) -> dict[str, Any]:
    """[images, 2, channels, height, width]: the overview and one crop of each, with the patches of both that count."""
    size = _pixels(found, grid)
    return {
        found.pixels: FloatSpec((images, 2, found.channels, *size), facts.dtype),
        "image_sizes": _long([list(size)] * images),
        "image_attention_mask": _ones(images, 2, *grid),
    }


def _whole_images(
    facts: Facts, found: ImageFacts, images: int, grid: tuple[int, int], rows: int, seq_len: int
) -> Iterator[dict[str, Any]]:
    """[images, channels, height, width], with the dimensions that tiling models and padded batches add."""
    height, width = _pixels(found, grid)
    image = (found.channels, height, width)
    extras = _extras(facts, found, images, grid, rows, seq_len)
    tiles = _tiles(facts, found)
    per_row = -(-images // rows)
    shapes: list[tuple[int, ...]] = []
    if tiles is not None:
        shapes.append((images, tiles[0], *image))
        extras["image_sizes"] = _long([list(tiles[1])] * images)
    elif "image_sizes" in facts.arguments and not _has_fixed_positions(facts, found):
        extras["image_sizes"] = _long([[height, width]] * images)
    if "aspect_ratio_ids" in facts.arguments:
        shapes.append((rows, per_row, int(first_value(facts.image_configs, "max_num_tiles") or 1), *image))
    shapes += [(images, *image), (rows, per_row, *image), (images, 1, *image)]
    patches, p = grid[0] * grid[1], found.patch
    shapes += [(images, patches, found.channels * p * p), (images * patches, found.temporal, p, p, found.channels)]
    for shape in shapes:
        for masks in _pixel_masks(facts, rows, per_row, (height, width), len(shape)):
            yield {found.pixels: FloatSpec(shape, facts.dtype), **extras, **masks}
    if "image_sizes" in extras:
        plain = [tuple(row) for row in extras["image_sizes"].tolist()]
        for shape in shapes:
            yield {found.pixels: FloatSpec(shape, facts.dtype), **extras, "image_sizes": plain}


def _pixel_masks(facts: Facts, rows: int, per_row: int, size: tuple[int, int], dims: int) -> list[dict[str, Tensor]]:
    """Which pixels, or which images, are no padding: all of them."""
    name = "pixel_attention_mask"
    if name not in facts.arguments or dims not in (4, 5):
        return [{}]
    if dims == 4:
        return [{}, {name: _ones(rows, per_row)}]
    whole = [_ones(rows, per_row, dtype=dtype) for dtype in (torch.long, torch.bool)]
    return [{name: mask} for mask in (_ones(rows, per_row, *size, dtype=torch.bool), *whole)]


def _pixels(found: ImageFacts, grid: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels of an image of `grid` patches; a native size need not be a multiple of the patch."""
    if found.size is not None and grid == tuple(side // found.patch for side in found.size):
        return found.size
    return grid[0] * found.patch, grid[1] * found.patch


def _extras(
    facts: Facts, found: ImageFacts, images: int, grid: tuple[int, int], rows: int, seq_len: int
) -> dict[str, Any]:
    """Further arguments that go with whole images."""
    names, configs = facts.arguments, facts.image_configs
    per_row = -(-images // rows)
    extras: dict[str, Any] = {}
    if "high_res_pixel_values" in names:
        side = first_value([getattr(facts.config, "high_res_vision_config", None)], "image_size") or _DEFAULT_SIZE
        extras["high_res_pixel_values"] = FloatSpec((images, found.channels, *pair(side)), facts.dtype)
    if "aspect_ratio_ids" in names:
        tiles = int(first_value(configs, "max_num_tiles") or 1)
        extras["aspect_ratio_ids"] = _ones(rows, per_row)
        extras["aspect_ratio_mask"] = _ones(rows, per_row, tiles)
        extras["cross_attention_mask"] = _ones(rows, seq_len, per_row, tiles)
    elif "image_attention_mask" in names and "perceiver_embeddings" in names:
        extras["image_attention_mask"] = _ones(rows, seq_len, per_row)
    if "image_token_pooling" in names:
        # Each token pools 2 x 2 patches of its image; the grids of tokens are those of the overview, no crops.
        tokens = (grid[0] // 2, grid[1] // 2)
        extras["image_token_pooling"] = _ones(images * tokens[0] * tokens[1], 4)
        extras["image_grids"] = _long([[*tokens, 0, 0]] * images)
        extras["image_num_crops"] = _ones(images)
    if "qformer_input_ids" in names:
        extras["qformer_input_ids"] = _ones(images, 16)
    if "image_embeds_position_mask" in names:
        count = int(first_value([facts.config], "latent_query_num") or 1) * per_row
        mask = torch.zeros(rows, seq_len, dtype=torch.bool, device="cpu")
        mask[:, 1 : 1 + count] = True
        extras["image_embeds_position_mask"] = mask
    if {"width", "height"} <= names:
        extras |= {"height": _long([grid[0]] * images), "width": _long([grid[1]] * images)}
    return extras
