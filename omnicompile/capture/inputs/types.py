"""What is asked for (`InputRequest`), what the model allows (`InputConstraints`), what comes out (`ExampleInputs`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from omnicompile.errors import CaptureError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class FloatSpec:
    """A float feature tensor that exists by shape only; the caller makes a fake (or random) tensor of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Merge(StrEnum):
    """How the features of an encoder reach the backbone."""

    PLACEHOLDERS = "placeholders"  # they replace placeholder tokens of the text sequence
    SEPARATE = "separate"  # cross attention, a prefix, an encoder-decoder, or two towers: no placeholders


class Rows(StrEnum):
    """What the rows (the leading dimension) of `input_ids` or `labels` stand for."""

    SAMPLES = "samples"  # packed text sequences
    IMAGES = "images"  # one text per image
    CLIPS = "clips"  # one text per audio clip


@dataclass(frozen=True)
class ImageConstraints:
    """Which image sizes a model takes.

    patch_size: pixels per side of a patch. multiple: (height, width) of the grid in patches must be a multiple of it.
    grid: the only grid that the vision tower takes, None where any grid will do. packed: patches of all images lie in
    one row, so that images may differ in size. note: what a reader must know of `grid`, if anything.
    """

    patch_size: int
    multiple: tuple[int, int] = (1, 1)
    grid: tuple[int, int] | None = None
    packed: bool = False
    note: str = ""

    def nearest_grid(self, height: int, width: int) -> tuple[int, int]:
        """The grid in patches for an image of `height` x `width` pixels, at least one multiple per side."""
        if self.grid is not None:
            return self.grid
        rows, cols = (max(1, round(px / self.patch_size / m)) * m for px, m in zip((height, width), self.multiple))
        return rows, cols


@dataclass(frozen=True)
class AudioConstraints:
    """Which clips a model takes: `frames` is the only length that it takes (None: any multiple of `multiple`);
    a frame is a column of the spectrogram (`frames_per_second` of them), or a sample of a waveform."""

    frames: int | None = None
    multiple: int = 1
    frames_per_second: float = 100.0
    waveform: bool = False

    def nearest_frames(self, seconds: float) -> int:
        if self.frames is not None:
            return self.frames
        return max(1, round(seconds * self.frames_per_second / self.multiple)) * self.multiple


@dataclass(frozen=True)
class InputConstraints:
    """What a model's forward puts on the numbers of an `InputRequest`.

    max_seq_len: the longest text row (None: unbounded, as with rotary positions). contrastive: the loss compares rows
    of text and images (`return_loss`). needs_images / needs_audio: the forward cannot run without.
    """

    images: ImageConstraints | None = None
    audio: AudioConstraints | None = None
    max_seq_len: int | None = None
    rows: Rows = Rows.SAMPLES
    encoder_decoder: bool = False
    contrastive: bool = False


class TextTooShort(CaptureError):
    """A text row cannot hold the placeholders of its images and audio, which take `needed` tokens."""

    def __init__(self, seq_len: int, needed: int) -> None:
        super().__init__(
            f"a sequence of {seq_len} tokens cannot hold its images and audio, which take {needed}: "
            "raise --seq-len, or give fewer or smaller ones"
        )
        self.needed = needed


@dataclass(frozen=True)
class InputRequest:
    """The exact numbers wanted.

    seq_len: tokens per text row, placeholders included. images: over all rows. image_grid: (height, width) of every
    image in patches (None: the model's fixed grid). audio_frames: frames per clip. clips: over all rows. batch: text
    rows, where rows are samples.
    """

    seq_len: int
    images: int = 0
    image_grid: tuple[int, int] | None = None
    audio_frames: int | None = None
    clips: int = 0
    batch: int = 1


@dataclass(frozen=True)
class ExampleInputs:
    """Keyword arguments for the model's forward.

    kwargs: real integer host tensors, `FloatSpec`s for float features, and plain values (flags). host: names of those
    that are metadata (grids, lengths, feature masks, token types), which are evaluated outside the trace; the other
    integer tensors (`input_ids`, `labels`, `position_ids`) are ordinary inputs. tokens_per_image / tokens_per_clip:
    placeholders in the text, 0 where the features go elsewhere. fixed_tokens_per_image: those of them whose number does
    not go by the image's size.
    """

    kwargs: dict[str, Any]
    host: set[str] = field(default_factory=set)
    seq_len: int = 0
    rows: int = 1
    images: int = 0
    clips: int = 0
    tokens_per_image: int = 0
    patches_per_image: int = 0
    frames_per_clip: int = 0
    tokens_per_clip: int = 0
    fixed_tokens_per_image: int = 0


@dataclass(frozen=True)
class Placeholder:
    """What stands in the text for the items of one of the forward's arguments. token: its id. grid: the argument with
    the grids [items, 3] of packed items, "" where items have one size. merge: patches per side that become a token."""

    token: int
    grid: str = ""
    merge: int = 1


@runtime_checkable
class StatesInputs(Protocol):
    """A model that says itself what its forward takes, instead of leaving it to names in its configuration."""

    def input_constraints(self) -> InputConstraints:
        """What the forward puts on the numbers of an `InputRequest`."""

    def example_inputs(self, request: InputRequest) -> ExampleInputs:
        """Arguments with exactly these numbers. Raises TextTooShort where the text row cannot hold the placeholders."""

    def placeholders(self) -> Mapping[str, Placeholder]:
        """By the argument that holds the items."""
