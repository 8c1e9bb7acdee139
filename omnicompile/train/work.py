"""What micro-batches hold beside their padding, read off the tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from omnicompile.train.flops import Work

_GRIDS = ("image_grid_thw", "video_grid_thw")


def work_of(batches: Sequence[Mapping[str, Any]]) -> Work:
    return sum(map(_work, batches), Work())


def _work(batch: Mapping[str, Any]) -> Work:
    lengths = segment_lengths(batch)
    patches = _patches(batch)
    frames = _frames(batch)
    return Work(
        tokens=float(sum(lengths)), token_squares=float(sum(n * n for n in lengths)), samples=float(len(lengths)),
        patches=float(sum(patches)), patch_squares=float(sum(n * n for n in patches)), images=float(len(patches)),
        frames=float(sum(frames)), frame_squares=float(sum(n * n for n in frames)), clips=float(len(frames)),
    )  # fmt: skip


def segment_lengths(batch: Mapping[str, Any]) -> list[int]:
    """Tokens of each sample. Packed rows tell samples by positions that start anew (omnicompile/data/assemble.py), and
    end with a segment of padding; without positions every row is a sample."""
    ids, positions = batch.get("input_ids"), batch.get("position_ids")
    if not isinstance(ids, Tensor):
        return []
    if not isinstance(positions, Tensor):
        return [ids.shape[-1]] * ids[..., 0].numel()
    running = positions[0] if positions.dim() == 3 else positions
    lengths = []
    for row in running:
        starts = (row == 0).nonzero().flatten().tolist()
        lengths += [end - start for start, end in pairwise(starts)]
    return lengths


def _patches(batch: Mapping[str, Any]) -> list[int]:
    """Of each image, and of each moment of a video: what attends to itself."""
    grids = [batch[name] for name in _GRIDS if isinstance(batch.get(name), Tensor)]
    return [height * width for grid in grids for t, height, width in grid.tolist() for _ in range(t)]


def _frames(batch: Mapping[str, Any]) -> list[int]:
    sound = batch.get("input_features")
    if not isinstance(sound, Tensor):
        return []
    mask = next((batch[n] for n in ("feature_attention_mask", "input_features_mask") if n in batch), None)
    if isinstance(mask, Tensor):
        return [int(n) for n in mask.sum(-1).flatten().tolist()]
    return [sound.shape[-1]] * (sound.shape[0] if sound.dim() == 3 else 1)
