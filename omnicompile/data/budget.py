"""Sizes of samples, and the budget of a micro-batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from omnicompile.capture.inputs.facts import Facts, first_value
from omnicompile.errors import InputError
from omnicompile.runtime.packing import pack

PAD_TOKENS = 1  # every row ends with padding of its own, so that all rows are packed ones and run one graph


SOUNDS = ("input_features",)  # counted in frames too, as clips may differ in length
_ITEM_WORDS = {"pixel_values": "images", "pixel_values_videos": "videos", "input_features": "clips"}


@dataclass(frozen=True)
class ItemBudget:
    """Items that a micro-batch holds in the forward's argument `name`: images of one size, clips of sound or video.
    tokens: placeholders that one takes in the text, each the same; 0 where they differ, so that none can be made up."""

    name: str
    count: int
    tokens: int = 0

    @property
    def room(self) -> int:
        """Tokens of the row that one takes: a made-up item has a token of padding before it."""
        return self.tokens + 1 if self.tokens else 0

    @property
    def word(self) -> str:
        return _ITEM_WORDS.get(self.name, self.name)


@dataclass(frozen=True)
class Size:
    """What a sample takes. tokens: placeholders of images and audio included. images: patches of each image that is
    given as rows of patches. frames, clips: of audio. items: (argument, number) of images of one size, clips, ..."""

    tokens: int
    images: tuple[int, ...] = ()
    frames: int = 0
    clips: int = 0
    items: tuple[tuple[str, int], ...] = ()

    def count(self, name: str) -> int:
        """Items in the argument `name`."""
        return dict(self.items).get(name, 0)

    @property
    def patches(self) -> int:
        return sum(self.images)

    @property
    def squares(self) -> int:
        """Sum over images of their squared number of patches: what attention in an encoder goes by."""
        return sum(patches * patches for patches in self.images)

    def to_list(self) -> list[Any]:
        return [self.tokens, list(self.images), self.frames, self.clips, [list(item) for item in self.items]]

    @staticmethod
    def from_list(values: Sequence[Any]) -> Size:
        tokens, images, frames, clips, *rest = values
        return Size(tokens, tuple(images), frames, clips, tuple((name, count) for name, count in (rest or [()])[0]))


@dataclass(frozen=True)
class Budget:
    """What one micro-batch holds: a row of `tokens` tokens, `patches` image patches, `frames` audio frames, `segments`
    attention segments (samples, or images, each with the padding's), and `items` of fixed size.

    merge: patches per side that become one token. parts: ranks that whole images are dealt out to (sp under layout
    "images"); each may need a dummy image of its own.

    What a row lacks is filled up with padding whose dummy images take a token for every merge^2 patches, and one token
    before each; dummy items of fixed size take `room` tokens each. So that they always fit, text beside them has
    tokens - patches / merge^2 - parts - items x room - 1 tokens at most.
    """

    tokens: int
    patches: int = 0
    frames: int = 0
    segments: int = 64
    merge: int = 1
    parts: int = 1
    items: tuple[ItemBudget, ...] = ()

    def __post_init__(self) -> None:
        if self.patches % (self.parts * self.merge**2):
            raise InputError(
                f"a budget of {self.patches} patches is not a multiple of {self.parts * self.merge**2} (patches per "
                "token, times ranks that images are dealt out to)"
            )
        if self.text < 1 or self.segments < 2:
            beside = [f"{self.patches} patches ({self.patches // self.merge**2} tokens)"] * bool(self.patches)
            beside += [f"{i.count} {i.word} ({i.count * i.room} tokens)" for i in self.items]
            raise InputError(
                f"a budget of {self.tokens} tokens and {self.segments} segments leaves nothing for text beside "
                f"{' and '.join(beside) or 'the padding'}: raise tokens, or lower what is beside it"
            )

    @property
    def text(self) -> int:
        """Tokens for what is no placeholder of an image or item."""
        images = self.patches // self.merge**2 + (self.parts if self.patches else 0)
        return self.tokens - images - sum(item.count * item.room for item in self.items) - PAD_TOKENS

    @property
    def room(self) -> tuple[int, ...]:
        """What a pack's `needs` may add up to. It should be full of all of these but the last two, which bound it."""
        images = self.segments - self.parts if self.patches else self.segments
        return self.text, self.patches, self.frames, *(i.count for i in self.items), self.segments - 1, images

    def needs(self, size: Size) -> tuple[int, ...]:
        """(text tokens, patches, frames, items of each kind, segments of text, images) of one sample. A real item gives
        back the token that is kept before a dummy in its place."""
        counts = [size.count(item.name) for item in self.items]
        beside = size.patches // self.merge**2 + sum(n * item.room for n, item in zip(counts, self.items))
        return max(0, size.tokens - beside), size.patches, size.frames, *counts, 1, len(size.images) + size.clips

    def holds(self, size: Size) -> bool:
        fits = all(need <= room for need, room in zip(self.needs(size), self.room))
        return fits and not self._unplanned(size) and self.deals([size])

    def _unplanned(self, size: Size) -> dict[str, int]:
        """Images and videos of fixed size of which the budget has none."""
        planned = {*(item.name for item in self.items), *SOUNDS}
        return {name: count for name, count in size.items if count and name in _ITEM_WORDS and name not in planned}

    def deals(self, sizes: Iterable[Size]) -> bool:
        """Whether whole images of these samples can be dealt out to `parts` ranks, each with its part of patches."""
        if self.parts == 1:
            return True
        return pack([n for size in sizes for n in size.images], self.parts, self.patches // self.parts) is not None

    def excess(self, size: Size) -> str:
        """Why `size` does not fit, in words."""
        words = [item.word for item in self.items]
        names = ("tokens beside its images", "patches", "audio frames", *words, "samples", "images")
        over = [
            f"{need:,} {name} (at most {room:,})"
            for name, need, room in zip(names, self.needs(size), self.room)
            if need > room
        ]
        over += [f"{count} {_ITEM_WORDS[name]} (at most 0)" for name, count in self._unplanned(size).items()]
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
    samples: Sequence[Size] | Iterable[Size], seq_len: int, merge: int = 1, parts: int = 1, segments: int = 0,
    items: Mapping[str, int] | None = None,
) -> Budget:  # fmt: skip
    """The budget of `seq_len` tokens whose patches, items (and frames) fill up as fast as its tokens on a mix of
    `samples`.

    samples: sizes, a few hundred at least. With patches P and text tokens X per sample on average, a row of S tokens
    holds patches in the proportion P / X of its text. Never less than the largest sample of the mix needs in patches,
    items and frames. segments: 0 takes the most that any row could need twice over. items: of the arguments that hold
    items, the placeholders of one (`item_tokens`). Raises InputError on an empty mix, and where a sample does not fit
    into `seq_len` tokens.
    """
    mix = list(samples)
    if not mix:
        raise InputError("suggest_budget needs sizes of samples, got none")
    one = [ItemBudget(name, 0, tokens) for name, tokens in (items or {}).items() if any(s.count(name) for s in mix)]
    unit, per_token = parts * merge**2, merge**2
    patches = sum(s.patches for s in mix)
    counts = [sum(s.count(item.name) for s in mix) for item in one]
    beside = patches / per_token + sum(count * item.room for count, item in zip(counts, one))
    text = max(1.0, sum(s.tokens for s in mix) - beside)
    room = seq_len - PAD_TOKENS - (parts if patches else 0)
    rows = room / (text + beside)  # of the whole mix in one row
    largest_image = max((n for s in mix for n in s.images), default=0)
    wanted = max(round(patches * rows), max(s.patches for s in mix), parts * largest_image)
    wanted = -(-wanted // unit) * unit
    found = tuple(
        ItemBudget(item.name, max(round(count * rows), max(s.count(item.name) for s in mix)), item.tokens)
        for item, count in zip(one, counts)
    )
    left = seq_len - PAD_TOKENS - wanted // per_token - sum(item.count * item.room for item in found)
    frames = max(round(sum(s.frames for s in mix) / text * left), max(s.frames for s in mix))
    if sounds := [item for item in found if item.name in SOUNDS and item.tokens]:
        frames = max(i.count for i in sounds) * max(-(-s.frames // s.clips) for s in mix if s.clips)
    if not segments:
        pictures = sum(len(s.images) + s.clips for s in mix)
        usual = seq_len * len(mix) / sum(s.tokens for s in mix) * max(1.0, pictures / len(mix))
        segments = max(64, 2 * round(usual), max(len(s.images) + s.clips for s in mix) + parts + 1)
    budget = Budget(seq_len, wanted, frames, segments, merge, parts, found)
    if largest := [s for s in mix if not budget.holds(s)]:
        raise InputError(
            f"{len(largest)} of {len(mix)} samples do not fit into {seq_len} tokens, one with "
            f"{budget.excess(max(largest, key=lambda s: s.tokens))}: raise seq_len, or split or skip such samples"
        )
    return budget
