"""Samples of one pack as the keyword arguments of a model's forward: one row, in which samples do not see each other.

Position ids start anew with every sample. By them transformers tells packed rows, and so do the attention anchors
(docs/data.md). Models whose positions have several axes get those of their own `get_rope_index`, sample by sample,
with the text's running position before them, as transformers' models of that kind take it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omnicompile.capture.inputs.facts import Facts
from omnicompile.capture.inputs.text import Text, rope_positions
from omnicompile.capture.inputs.types import StatesInputs
from omnicompile.data.budget import PAD_TOKENS
from omnicompile.data.encode import IDS, IGNORE, KINDS, LABELS, Encoded
from omnicompile.errors import InputError

POSITIONS = "position_ids"
_PADDING = Encoded(*(torch.full((PAD_TOKENS,), value, dtype=torch.int64) for value in (0, IGNORE, 0)))
_RECURRENT = frozenset({"linear_attention", "mamba", "recurrent", "conv", "ssm"})


@dataclass(frozen=True)
class Assembler:
    """Makes packed rows for `model` (may be on the meta device: only its configuration and host code are used)."""

    model: nn.Module
    arguments: frozenset[str]

    @staticmethod
    def of(model: nn.Module) -> Assembler:
        """Raises InputError where the model cannot keep samples of a row apart."""
        facts = Facts.of(model)
        if POSITIONS not in facts.arguments or IDS not in facts.arguments:
            raise InputError(
                f"{type(model).__name__} takes no {POSITIONS}, by which samples packed into a row are told: give it "
                "one sample a row with a loader of your own"
            )
        kinds = facts.text.to_dict().get("layer_types") or ()
        if mixed := sorted(_RECURRENT & set(kinds)):
            raise InputError(
                f"{type(model).__name__} has layers ({', '.join(mixed)}) that carry a state from one sample of a row "
                "into the next: samples cannot be packed"
            )
        stated = model.placeholders() if isinstance(model, StatesInputs) else {}
        return Assembler(model, facts.arguments | stated.keys())

    def row(self, samples: Sequence[Encoded]) -> dict[str, Any]:
        """One micro-batch. All int tensors along the tokens are [1, tokens], the padding at the end included; position
        ids [1, tokens] or [1 + axes, 1, tokens]. Raises InputError for features that the model does not take.

        Padding is a segment of its own, of one token. So every row has two segments at least, also one of no sample.
        """
        samples = [*(samples or [_PADDING]), _PADDING]
        positions = torch.cat([self._positions(sample) for sample in samples], -1)
        batch: dict[str, Any] = {
            IDS: torch.cat([s.ids for s in samples])[None],
            LABELS: torch.cat([_without_first(s.labels) for s in samples])[None],
            POSITIONS: positions if positions.shape[0] == 1 else positions[:, None],
        }
        if KINDS in self.arguments:
            batch[KINDS] = torch.cat([s.kinds for s in samples])[None]
        names = {name for sample in samples for name in sample.features}
        if unknown := sorted(names - self.arguments):
            raise InputError(f"the encoder gives {', '.join(unknown)}, which {type(self.model).__name__} does not take")
        for name in sorted(names):
            batch[name] = _features(name, [s.features[name] for s in samples if name in s.features])
        return batch

    def _positions(self, sample: Encoded) -> Tensor:
        """[1, tokens], or [1 + axes, tokens]."""
        running = torch.arange(len(sample.ids))[None]
        text = Text(sample.ids[None], sample.labels[None], sample.kinds[None])
        axes = rope_positions(self.model, dict(sample.features), text)
        return running if axes is None else torch.cat([running, axes[:, 0].to(torch.int64)])


def _without_first(labels: Tensor) -> Tensor:
    """The first token of a sample is predicted from nothing; in a row the last token before it would predict it."""
    labels = labels.clone()
    labels[:1] = IGNORE
    return labels


def _features(name: str, parts: list[Tensor]) -> Tensor:
    if len({part.shape[1:] for part in parts}) > 1:
        raise InputError(
            f"`{name}` of the samples of one row have shapes {', '.join(str(list(p.shape)) for p in parts)}, which "
            "cannot be joined: the encoder must give all of them the same size but for the first dimension"
        )
    return torch.cat(parts)
