"""What one training sample looks like, and how many make an optimizer step."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from omnicompile.errors import InputError


@dataclass(frozen=True)
class Workload:
    """One sample, and the samples per optimizer step. A micro-batch packs `micro_batch` such samples.

    seq_len: tokens the language backbone sees per sample, placeholders of images and audio included.
    images: images per sample (None: two where the model takes images, as far as they fit; otherwise none).
    image_size: (height, width) of each image in pixels; models with a fixed input size ignore it.
    audio_seconds: seconds of audio per sample (None: 30 where the model takes audio; otherwise 0).
    global_batch: samples per optimizer step over all GPUs (None: one per GPU).
    freeze: modality blocks whose parameters are not trained; "encoders" names every encoder block.
    """

    seq_len: int = 8192
    images: int | None = None
    image_size: tuple[int, int] = (896, 896)
    audio_seconds: float | None = None
    global_batch: int | None = None
    freeze: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise InputError(f"--seq-len must be at least 1, got {self.seq_len}")
        if self.global_batch is not None and self.global_batch < 1:
            raise InputError(f"--global-batch must be at least 1, got {self.global_batch}")
        if self.images is not None and self.images < 0:
            raise InputError(f"images per sample must not be negative, got {self.images}")
        if self.audio_seconds is not None and self.audio_seconds < 0:
            raise InputError(f"audio seconds must not be negative, got {self.audio_seconds}")
        if min(self.image_size) < 1:
            raise InputError(f"image size must be positive, got {self.image_size}")

    def to_dict(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {"image_size": list(self.image_size), "freeze": list(self.freeze)}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Workload:
        data = dict(data)
        if "image_size" in data:
            data["image_size"] = tuple(data["image_size"])
        if "freeze" in data:
            data["freeze"] = tuple(data["freeze"])
        return Workload(**data)
