"""Records, encoders and tokenizers for tests: small, and of known sizes."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import IMAGE

from omnicompile.data.sample import BadSample, Sample

GRIDS = ((4, 4), (4, 8), (8, 4), (6, 8), (8, 8))
WIDTH = 3 * 2 * 4 * 4


def records(count: int, images: bool = True) -> list[dict[str, Any]]:
    """Texts that say how long the sample is, and images that are the numbers of a grid."""
    found: list[dict[str, Any]] = []
    for n in range(count):
        has = images and n % 3 != 0
        found.append({"text": f"{n} {6 + n * 7 % 23}", "images": [n % len(GRIDS)] * (1 + n % 2) if has else []})
    return found


def encode(sample: Sample) -> dict[str, Any]:
    """[text tokens of the stated length] with images spread in it; every value follows from the sample's number."""
    number, length = map(int, (sample.text or "").split())
    if length < 0:
        raise BadSample("its length is negative")
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(1, 100, (length,), generator=generator).tolist()
    kinds = [0] * length
    grids = [GRIDS[image] for image in sample.images]
    for place, (height, width) in enumerate(grids):
        tokens, at = height * width // 4, 2 + place * (3 + height * width // 4)
        ids[at:at], kinds[at:at] = [IMAGE] * tokens, [1] * tokens
    given: dict[str, Any] = {"input_ids": ids, "mm_token_type_ids": kinds}
    if grids:
        given["image_grid_thw"] = torch.tensor([[1, *grid] for grid in grids])
        given["pixel_values"] = torch.randn(sum(h * w for h, w in grids), WIDTH, generator=generator)
    return given
