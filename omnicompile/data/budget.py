"""Sizes of samples, and the budget of a micro-batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from omnicompile.capture.inputs.facts import Facts, first_value
from omnicompile.errors import InputError
from omnicompile.runtime.packing import pack

PAD_TOKENS = 1  # every row ends with padding of its own, so that all rows are packed ones and run one graph


@dataclass(frozen=True)
class Size:
    """What a sample takes. tokens: placeholders of images and audio included. images: patches of each image. frames,
    clips: of audio."""

    tokens: int
    images: tuple[int, ...] = ()
    frames: int = 0
    clips: int = 0

    @property
    def patches(self) -> int:
        return sum(self.images)

    @property
    def squares(self) -> int:
        """Sum over images of their squared number of patches: what attention in an encoder goes by."""
        return sum(patches * patches for patches in self.images)

    def to_list(self) -> list[Any]:
        return [self.tokens, list(self.images), self.frames, self.clips]

    @staticmethod
    def from_list(values: Sequence[Any]) -> Size:
        tokens, images, frames, clips = values
        return Size(tokens, tuple(images), frames, clips)


@dataclass(frozen=True)
class Budget:
    """What one micro-batch holds: a row of `tokens` tokens, `patches` image patches, `frames` audio frames and
    `segments` attention segments (samples, or images, each with the padding's).

    merge: patches per side that become one token (1 where images stand for themselves). parts: ranks that whole images
    are dealt out to (sp under layout "images"); each may need a dummy image of its own.

    What a row lacks is filled up with padding whose dummy images take a token for every merge^2 patches, and one token
    before each. So that they always fit, text beside images has tokens - patches / merge^2 - parts - 1 tokens at most.
    """

    tokens: int
    patches: int = 0
    frames: int = 0
    segments: int = 64
    merge: int = 1
    parts: int = 1

    def __post_init__(self) -> None:
        if self.patches % (self.parts * self.merge**2):
            raise InputError(
                f"a budget of {self.patches} patches is not a multiple of {self.parts * self.merge**2} (patches per "
                "token, times ranks that images are dealt out to)"
            )
        if self.text < 1 or self.segments < 2:
            raise InputError(
                f"a budget of {self.tokens} tokens and {self.segments} segments leaves nothing for text beside "
                f"{self.patches} patches ({self.patches // self.merge**2} tokens): raise tokens, or lower patches"
            )

    @property
    def text(self) -> int:
        """Tokens for what is no placeholder of an image."""
        room = self.parts if self.patches else 0
        return self.tokens - self.patches // self.merge**2 - room - PAD_TOKENS

    @property
    def room(self) -> tuple[int, ...]:
        """What a pack's `needs` may add up to."""
        images = self.segments - self.parts if self.patches else self.segments
        return self.text, self.patches, self.frames, self.segments - 1, images

    def needs(self, size: Size) -> tuple[int, ...]:
        """(text tokens, patches, frames, segments of text, images) of one sample."""
        return size.tokens - size.patches // self.merge**2, size.patches, size.frames, 1, len(size.images) + size.clips

    def holds(self, size: Size) -> bool:
        return all(need <= room for need, room in zip(self.needs(size), self.room)) and self.deals([size])

    def deals(self, sizes: Iterable[Size]) -> bool:
        """Whether whole images of these samples can be dealt out to `parts` ranks, each with its part of patches."""
        if self.parts == 1:
            return True
        return pack([n for size in sizes for n in size.images], self.parts, self.patches // self.parts) is not None

    def excess(self, size: Size) -> str:
        """Why `size` does not fit, in words."""
        names = ("tokens beside its images", "patches", "audio frames", "samples", "images")
        over = [
            f"{need:,} {name} (at most {room:,})"
            for name, need, room in zip(names, self.needs(size), self.room)
            if need > room
        ]
        return ", ".join(over) or f"images that cannot be dealt out to {self.parts} ranks in equal parts of its patches"


def merge_of(model: nn.Module) -> int:
    """Patches per side that a model merges into one token; 1 if its configuration names none."""
    return int(first_value(Facts.of(model).image_configs, "spatial_merge_size", "merge_size") or 1)


def attention_weights(model: nn.Module) -> tuple[int, int]:
    """(text, vision): layers times width of the two stacks, what a squared segment length costs in each."""
    facts = Facts.of(model)
    layers = ("num_hidden_layers", "depth", "num_layers")
    text = int(first_value((facts.text,), *layers) or 1) * int(facts.text.hidden_size)
    towers = facts.image_configs[:-1]
    depth, width = first_value(towers, "depth", *layers), first_value(towers, "embed_dim", "hidden_size")
    return text, int(depth or 0) * int(width or 0)


def suggest_budget(
    samples: Sequence[Size] | Iterable[Size], seq_len: int, merge: int = 1, parts: int = 1, segments: int = 0
) -> Budget:
    """The budget of `seq_len` tokens whose patches (and frames) fill up as fast as its tokens on a mix of `samples`.

    samples: sizes, a few hundred at least. With patches P and text tokens X per sample on average, a row of S tokens
    holds patches in the proportion P / X of its text. Never less than the largest sample of the mix needs in patches
    and frames. segments: 0 takes the most that any row could need twice over. Raises InputError on an empty mix, and
    where a sample does not fit into `seq_len` tokens.
    """
    mix = list(samples)
    if not mix:
        raise InputError("suggest_budget needs sizes of samples, got none")
    unit, per_token = parts * merge**2, merge**2
    patches = sum(s.patches for s in mix)
    text = sum(s.tokens - s.patches // per_token for s in mix)
    room = seq_len - PAD_TOKENS - (parts if patches else 0)
    share = patches / (patches / per_token + text)
    largest_image = max((n for s in mix for n in s.images), default=0)
    wanted = max(round(share * room), max(s.patches for s in mix), parts * largest_image)
    wanted = -(-wanted // unit) * unit
    left = seq_len - PAD_TOKENS - wanted // per_token
    frames = max(round(sum(s.frames for s in mix) / max(text, 1) * left), max(s.frames for s in mix))
    if not segments:
        pictures = sum(len(s.images) + s.clips for s in mix)
        usual = seq_len * len(mix) / sum(s.tokens for s in mix) * max(1.0, pictures / len(mix))
        segments = max(64, 2 * round(usual), max(len(s.images) + s.clips for s in mix) + parts + 1)
    budget = Budget(seq_len, wanted, frames, segments, merge, parts)
    if largest := [s for s in mix if not budget.holds(s)]:
        raise InputError(
            f"{len(largest)} of {len(mix)} samples do not fit into {seq_len} tokens, one with "
            f"{budget.excess(max(largest, key=lambda s: s.tokens))}: raise seq_len, or split or skip such samples"
        )
    return budget
