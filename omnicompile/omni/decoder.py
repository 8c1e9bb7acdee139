"""Decoders: a modality that the model produces, as codes of a tokenizer."""

from __future__ import annotations

import inspect
import math
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnicompile.errors import InputError
from omnicompile.omni.classes import size_of
from omnicompile.omni.config import DecoderConfig
from omnicompile.omni.parts import ModalityPart, fake_shape, follow, make_projector, make_tower

IGNORE = -100


class DiscreteDecoder(ModalityPart):
    """A tokenizer (VQ model) between values and codes, an embedding of codes, and a head that predicts them."""

    config: DecoderConfig
    config_class = DecoderConfig

    def __init__(self, config: DecoderConfig, hidden: int) -> None:
        super().__init__(config)
        where = f"decoder {config.name}"
        self.codes = size_of(config.codes, config.tower, where)
        width = size_of(config.embed_dim, config.tower, where)
        self.tower = make_tower(config)
        self.embedding = nn.Embedding(self.codes, width)
        self.projector = make_projector("mlp", width, hidden, where)
        inner = config.head_dim or hidden
        self.head = nn.Sequential(nn.Linear(hidden, inner), nn.GELU(), nn.Linear(inner, self.codes, bias=False))
        self.post_init()

    def tokenize(self, values: Tensor) -> Tensor:
        """values [items, *shape of one] -> codes [items, codes of one], int64. No gradient flows back."""
        method = getattr(self.tower, self.config.encode)
        sizes = [tuple(values.shape[-2:])] * values.shape[0]
        known = {"image_sizes": sizes} if "image_sizes" in inspect.signature(method).parameters else {}
        found = follow(method(values, **known), self.config.codes_output, f"decoder {self.config.name}")
        if isinstance(found, list | tuple):
            found = torch.stack(list(found))
        return found.reshape(values.shape[0], -1)

    def lm_encode(self, values: Tensor, grid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """values: raw [items, *shape of one], or codes [items, codes of one]. Returns the inputs for the places of the
        codes [codes of all items, hidden], and the codes [codes of all items]."""
        codes = self.tokenize(values) if values.is_floating_point() else values
        codes = codes.flatten()
        return self.lm_embed(codes), codes

    def lm_embed(self, codes: Tensor) -> Tensor:
        """[n] -> [n, hidden]: the next input after a predicted code."""
        return self.projector(self.embedding(codes))

    def lm_head(self, hidden: Tensor, codes: Tensor | None = None, trained: Tensor | None = None) -> tuple[Tensor, Any]:
        """hidden [n, hidden]: of the places before those of the codes. codes [n]; trained [n]: which of them are
        targets. Returns logits [n, codes] and the mean loss over the targets (None without codes)."""
        logits = self.head(hidden)
        if codes is None or trained is None:
            return logits, None
        if type(logits) is Tensor and not bool(trained.any()):  # nothing to average, in a forward that is really run
            return logits, logits.sum() * 0.0
        return logits, F.cross_entropy(logits.float(), codes.masked_fill(~trained, IGNORE), ignore_index=IGNORE)

    def lm_generate(self, codes: Tensor) -> Tensor:
        """codes [items, codes of one] -> values [items, *shape of one]."""
        if self.config.grid:
            side = math.isqrt(codes.shape[1])
            codes = codes.unflatten(1, (side, -1))
        values = getattr(self.tower, self.config.decode)(codes)
        return values if isinstance(values, Tensor) else values[0]

    @cached_property
    def item_shape(self) -> tuple[int, ...]:
        config = self.config
        shape = tuple(size_of(size, config.tower, f"decoder {config.name}") for size in config.input or [])
        if not shape:
            raise InputError(f"decoder {config.name}: give the shape of what it produces as input")
        return shape

    @cached_property
    def item_tokens(self) -> int:
        """Codes of one item."""
        return int(fake_shape(self, self.item_shape).shape[0])
