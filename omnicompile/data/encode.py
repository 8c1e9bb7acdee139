"""From samples to token ids, labels and features: by the model's own processor, or by any function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from omnicompile.data.budget import Size
from omnicompile.data.media import load_audio, load_image, load_video
from omnicompile.data.sample import BadSample, Sample
from omnicompile.errors import InputError

IGNORE = -100
IDS, LABELS, MASK, KINDS = "input_ids", "labels", "attention_mask", "mm_token_type_ids"
PATCHES, GRIDS = ("pixel_values", "pixel_values_videos"), ("image_grid_thw", "video_grid_thw")
FRAMES, FRAME_MASKS = ("input_features",), ("feature_attention_mask", "input_features_mask")

Encoder = Callable[[Sample], Mapping[str, Any]]
"""Gives what a model's forward takes for one sample: `input_ids` [tokens] (or [1, tokens]), and, where there are,
`labels` (the tokens themselves, -100 where ignored; not shifted), `mm_token_type_ids`, and features whose first
dimension counts patches, images or clips. It gives a sample the same sizes every time. May raise BadSample."""


@dataclass(frozen=True)
class Encoded:
    """One sample as tensors. ids, labels, kinds: [tokens] int64; kinds: 0 for text, else placeholders of a modality.
    features: by argument name, joined along dim 0 when samples are packed."""

    ids: Tensor
    labels: Tensor
    kinds: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(given: Mapping[str, Any]) -> Encoded:
        """Checks what an encoder gave. Raises BadSample."""
        if IDS not in given:
            raise BadSample(f"the encoder gave no `input_ids`, only {', '.join(sorted(given)) or 'nothing'}")
        ids = _row(given[IDS], IDS)
        real = _row(given[MASK], MASK, len(ids)) != 0 if given.get(MASK) is not None else torch.ones_like(ids).bool()
        kinds = _row(given[KINDS], KINDS, len(ids)) if given.get(KINDS) is not None else torch.zeros_like(ids)
        labels = given.get(LABELS)
        labels = ids.masked_fill(kinds > 0, IGNORE) if labels is None else _row(labels, LABELS, len(ids))
        rest = {
            k: torch.as_tensor(v) for k, v in given.items() if k not in (IDS, LABELS, MASK, KINDS) and v is not None
        }
        if not bool(real.any()):
            raise BadSample("it has no tokens")
        return Encoded(ids[real], labels[real], kinds[real], rest)

    @property
    def size(self) -> Size:
        packed = {n: self.features[grid] for n, grid in zip(PATCHES, GRIDS) if grid in self.features}
        images = [int(n) for grid in packed.values() for n in grid.prod(-1).tolist()]
        rows = sum(self.features[name].shape[0] for name in packed if name in self.features)
        if packed and sum(images) != rows:
            raise BadSample(f"its images have {rows} patches, its grids say {sum(images)}")
        items = [
            (name, value.shape[0])
            for name, value in sorted(self.features.items())
            if value.is_floating_point() and value.dim() > 1 and name not in packed
        ]
        return Size(len(self.ids), tuple(images), *self._frames(), tuple(items))

    def _frames(self) -> tuple[int, int]:
        """Frames that are no padding, and clips."""
        sound = next((self.features[name] for name in FRAMES if name in self.features), None)
        if sound is None:
            return 0, 0
        mask = next((self.features[name] for name in FRAME_MASKS if name in self.features), None)
        return int(mask.sum()) if mask is not None else sound.shape[0] * sound.shape[-1], sound.shape[0]

    @property
    def bytes(self) -> int:
        tensors = (self.ids, self.labels, self.kinds, *self.features.values())
        return sum(t.numel() * t.element_size() for t in tensors)


def _row(value: Any, name: str, length: int | None = None) -> Tensor:
    row = torch.as_tensor(value)
    row = row[0] if row.dim() == 2 and row.shape[0] == 1 else row
    if row.dim() != 1 or row.is_floating_point() or (length is not None and len(row) != length):
        raise BadSample(f"the encoder gave `{name}` of shape {list(row.shape)}, not one integer per token")
    return row.to(torch.int64)


@dataclass(frozen=True)
class ProcessorEncoder:
    """Encodes with a Hugging Face processor or tokenizer.

    Conversations go through its chat template. train_on: "assistant" takes the turns of the assistant for targets,
    "all" every token of text. Placeholders of images, video and audio are never targets. options: further arguments for
    the processor's call.
    """

    processor: Any
    train_on: str = "assistant"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.train_on not in ("assistant", "all"):
            raise InputError(f"train_on must be 'assistant' or 'all', got {self.train_on!r}")

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer if self._is_processor else self.processor

    @property
    def _is_processor(self) -> bool:
        from transformers import ProcessorMixin

        return isinstance(self.processor, ProcessorMixin)

    def __call__(self, sample: Sample) -> dict[str, Any]:
        if sample.messages is None:
            given, spans = self._encode(sample.text or "", sample), None
        else:
            text, spans = self._render(list(sample.messages))
            given = self._encode(text, sample)
        ids = _row(given[IDS], IDS)
        targets = torch.ones_like(ids).bool() if spans is None else self._targets(ids, spans)
        return given | {LABELS: ids.masked_fill(~targets | self._placeholders(ids), IGNORE)}

    def _encode(self, text: str, sample: Sample) -> dict[str, Any]:
        if not self._is_processor:
            if sample.images or sample.audio or sample.videos:
                raise InputError(
                    "samples have images, audio or video, and a tokenizer alone encodes none: give a processor"
                )
            special = sample.messages is None
            return {IDS: self.tokenizer(text, add_special_tokens=special, **self.options)[IDS]}
        media: dict[str, Any] = {}
        if sample.images:
            media["images"] = [load_image(image) for image in sample.images]
        if sample.audio:
            rate = self.processor.feature_extractor.sampling_rate
            media["audio"] = [load_audio(sound, rate) for sound in sample.audio]
        if sample.videos:
            media["videos"] = [load_video(video) for video in sample.videos]
        try:
            given = dict(self.processor(text=[text], return_tensors="pt", **media, **self.options))
        except (ValueError, IndexError) as error:  # placeholders that do not match the images, an image too thin, ...
            raise BadSample(f"the processor refuses it: {error}") from error
        given.pop("token_type_ids", None)
        if KINDS not in given:
            given[KINDS] = self.processor.create_mm_token_type_ids(given[IDS])
        return given

    def _render(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[str, str]] | None]:
        """The conversation as text, and for each turn of the assistant the text before it and up to its end."""
        try:
            text = self.processor.apply_chat_template(messages, tokenize=False)
            if self.train_on == "all":
                return text, None
            spans = []
            for number, message in enumerate(messages):
                if message["role"] == "assistant":
                    before = self._template(messages[:number], prompt=True) if number else ""
                    spans.append((before, self._template(messages[: number + 1], prompt=False)))
        except ValueError as error:  # no chat template at all
            raise InputError(f"conversations need a chat template: {error}") from error
        if not spans:
            raise BadSample("it has no turn of the assistant to train on (train_on='all' takes every token)")
        if not all(text.startswith(after) and after.startswith(before) for before, after in spans):
            raise InputError(
                "the chat template changes earlier turns when later ones follow, so that the assistant's turns cannot "
                "be told: use train_on='all', or an encoder that gives `labels`"
            )
        return text, spans

    def _template(self, messages: list[dict[str, Any]], prompt: bool) -> str:
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    def _placeholder_ids(self) -> list[int]:
        if not self._is_processor:
            return []
        found = (*self.processor.image_token_ids, *self.processor.video_token_ids, *self.processor.audio_token_ids)
        return [token for token in found if token is not None]

    def _placeholders(self, ids: Tensor) -> Tensor:
        return torch.isin(ids, torch.tensor(self._placeholder_ids(), dtype=torch.int64))

    def _targets(self, ids: Tensor, spans: Sequence[tuple[str, str]]) -> Tensor:
        """[tokens] bool: the assistant's. Places in the text become places among the tokens by tokenizing what stands
        before them; a run of placeholders counts as one, since the processor repeats it."""
        plain = set(self._placeholder_ids())
        runs = [(token, len(list(run))) for token, run in _runs(ids.tolist(), plain)]
        ends = torch.tensor([0, *(count for _, count in runs)]).cumsum(0)
        targets = torch.zeros_like(ids).bool()
        for before, after in spans:
            bounds = []
            for text in (before, after):
                tokens = [token for token, _ in _runs(self.tokenizer(text, add_special_tokens=False)[IDS], plain)]
                if tokens != [token for token, _ in runs[: len(tokens)]]:
                    raise InputError(
                        "turns of the assistant cannot be told among the tokens, since text before them is tokenized "
                        "in another way alone: use train_on='all', or an encoder that gives `labels`"
                    )
                bounds.append(int(ends[len(tokens)]))
            targets[bounds[0] : bounds[1]] = True
        return targets


def _runs(ids: Sequence[int], joined: set[int]) -> Any:
    """Tokens one by one, runs of one of `joined` as one."""
    return groupby(ids, key=_RunKey(joined))


class _RunKey:
    """A key that is equal for neighbours of one run, and new for every other token."""

    def __init__(self, joined: set[int]) -> None:
        self._joined = joined
        self._number = 0

    def __call__(self, token: int) -> Any:
        self._number += token not in self._joined
        return (token, 0) if token in self._joined else (token, self._number)
