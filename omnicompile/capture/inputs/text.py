"""The text side: token ids with placeholders, labels, token types, positions."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omnicompile.capture.inputs.facts import Facts, special_ids
from omnicompile.capture.inputs.types import TextTooShort
from omnicompile.errors import CaptureError

IGNORED_LABEL = -100
_GAP = 2  # text tokens before each run of placeholders: models tell one image from the next by them


@dataclass(frozen=True)
class Span:
    """`count` placeholders of one image or clip. kind: 1 for images, 2 for audio, as in `mm_token_type_ids`."""

    token: int
    count: int
    kind: int


@dataclass(frozen=True)
class Text:
    """ids, labels, types: [rows, seq_len]."""

    ids: Tensor
    labels: Tensor
    types: Tensor


def spans_per_row(spans: list[Span], rows: int) -> list[list[Span]]:
    """Deal `spans` out to `rows` rows, in order and as evenly as can be."""
    share = -(-len(spans) // rows) if spans else 0
    return [spans[row * share : (row + 1) * share] for row in range(rows)]


def make_text(facts: Facts, rows: int, seq_len: int, spans: list[Span]) -> Text:
    """Rows of arbitrary text tokens with placeholders in between. Labels are the tokens themselves (models shift them),
    placeholders ignored. Raises CaptureError if the placeholders do not fit."""
    vocabulary = _text_tokens(facts)
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        ids = vocabulary[torch.randint(len(vocabulary), (rows, seq_len), generator=generator)]
        types = torch.zeros(rows, seq_len, dtype=torch.long)
    for row, row_spans in enumerate(spans_per_row(spans, rows)):
        needed = sum(span.count + _GAP for span in row_spans)
        if needed > seq_len:
            raise TextTooShort(seq_len, needed)
        at = 0
        for span in row_spans:
            at += _GAP
            ids[row, at : at + span.count] = span.token
            types[row, at : at + span.count] = span.kind
            at += span.count
    labels = ids.masked_fill(types > 0, IGNORED_LABEL)
    return Text(ids, labels, types)


def _text_tokens(facts: Facts) -> Tensor:
    """Ids that no configuration gives a meaning to."""
    size = int(getattr(facts.text, "vocab_size", 0) or 0)
    if size < 2:
        raise CaptureError("the configuration states no vocab_size: give inputs()")
    special = special_ids(facts.config)
    low = min(10, size // 2)
    plain = [token for token in range(low, min(size, low + 1000)) if token not in special] or [size - 1]
    return torch.tensor(plain, device="cpu")


def rope_positions(model: nn.Module, kwargs: dict[str, Any], text: Text) -> Tensor | None:
    """Multi-axis position ids by the model's own `get_rope_index`, which reads token ids and so cannot be traced; None
    if the model has none."""
    owner = next((m for m in model.modules() if hasattr(m, "get_rope_index")), None)
    if owner is None:
        return None
    parameters = inspect.signature(owner.get_rope_index).parameters  # type: ignore[operator]
    known = dict(kwargs, input_ids=text.ids, mm_token_type_ids=text.types)
    mask = kwargs.get("feature_attention_mask")
    if isinstance(mask, Tensor):
        known["audio_seqlens"] = mask.sum(-1)
    if "attention_mask" in parameters:
        known["attention_mask"] = torch.ones_like(text.ids)
    given = {name: known[name] for name in parameters if name in known}
    try:
        with torch.device("cpu"):
            result = owner.get_rope_index(**given)  # type: ignore[operator]
    except AttributeError:  # the configuration lacks a token id that only this needs: the model's own default serves
        return None
    except ValueError as error:
        raise CaptureError(f"{type(owner).__name__}'s own get_rope_index refuses the configuration: {error}") from error
    return result[0] if isinstance(result, tuple) else result
