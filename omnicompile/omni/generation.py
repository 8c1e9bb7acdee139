"""Generation of text and of what decoders produce, in one sequence.

Each step the language model reads one more token of every row. Where a decoder's start token was predicted, its head
predicts the codes of one item, and its embedding is read next; after the last code the end token follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from omnicompile.errors import InputError

if TYPE_CHECKING:
    from omnicompile.omni.model import OmniModel


@dataclass
class Generated:
    """ids: [rows, tokens] with the prompt, filled up with `pad` after a row's end. items: by decoder and row, what it
    produced there, each [*shape of one item]. codes: the same as codes, [codes of one item]."""

    ids: Tensor
    items: dict[str, list[list[Tensor]]] = field(default_factory=dict)
    codes: dict[str, list[list[Tensor]]] = field(default_factory=dict)


@dataclass
class _Row:
    """What a row is about to predict: text, or codes of the decoder `producing`, of which `found` are there."""

    producing: str = ""
    found: list[int] = field(default_factory=list)
    ended: bool = False


@torch.no_grad()
def generate(
    model: OmniModel, input_ids: Tensor, max_new_tokens: int, temperature: float, features: Mapping[str, Any]
) -> Generated:
    """Continue every row by `max_new_tokens` tokens, codes included, or until the language model's end-of-text token.

    input_ids: [rows, tokens]. temperature: 0 takes the likeliest. features: those of the prompt, as in the forward. The
    model is run as it is: call `eval()` before. Raises InputError for a bad number, and where the prompt asks for an
    item that is longer than `max_new_tokens`; the model itself starts none that would not be finished.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise InputError(
            f"max_new_tokens must be positive and temperature not negative: {max_new_tokens}, {temperature}"
        )
    state = _Generation(model, input_ids, temperature, max_new_tokens)
    output = model(input_ids=input_ids, use_cache=True, **features)
    for left in range(max_new_tokens, 0, -1):
        embeds = state.next(output.hidden_states[:, -1], output.logits[:, -1], left)
        if state.done:
            break
        output = model(inputs_embeds=embeds, past_key_values=output.past_key_values, use_cache=True)
    return state.result()


class _Generation:
    def __init__(self, model: OmniModel, input_ids: Tensor, temperature: float, most: int) -> None:
        self.model, self.temperature = model, temperature
        config = model.config
        self.starts = {config.decoder(name).start_token_id: name for name in config.decoders or []}
        # A placeholder is never predicted: its places are the decoder's.
        self.banned = [part.config.token_id for part in model.parts().values()]
        end = config.get_text_config().eos_token_id
        self.end = {end} if isinstance(end, int) else set(end or ())
        self.pad = config.get_text_config().pad_token_id or 0
        self.rows = [self._first(row, most) for row in input_ids.tolist()]
        self.columns = [input_ids]
        self.codes: dict[str, list[list[Tensor]]] = {n: [[] for _ in self.rows] for n in config.decoders or []}

    def _first(self, ids: list[int], most: int) -> _Row:
        """A prompt may end in a start token, to ask for an item."""
        name = self.starts.get(ids[-1], "")
        if name and (tokens := self.model.decoder(name).item_tokens) > most:
            raise InputError(f"an item of {name} has {tokens} codes: max_new_tokens {most} is too small")
        return _Row(producing=name)

    @property
    def done(self) -> bool:
        return all(row.ended for row in self.rows)

    def next(self, hidden: Tensor, logits: Tensor, left: int) -> Tensor:
        """hidden [rows, hidden] and logits [rows, vocabulary] of the last place -> the next inputs [rows, 1, hidden].
        left: how many tokens there may yet be, this one included."""
        too_long = [start for start, name in self.starts.items() if self.model.decoder(name).item_tokens >= left]
        logits = logits.clone()
        logits[:, self.banned + too_long] = float("-inf")
        ids = self._pick(logits)
        embeds = [None] * len(self.rows)
        for number, row in enumerate(self.rows):
            if row.ended:
                ids[number] = self.pad
            elif row.producing:
                ids[number], embeds[number] = self._produce(number, row, hidden[number : number + 1])
            else:
                self._read(row, int(ids[number]))
        self.columns.append(ids[:, None])
        text = self.model.get_input_embeddings()(ids)
        return torch.stack([t if e is None else e for t, e in zip(text, embeds)])[:, None]

    def _pick(self, logits: Tensor) -> Tensor:
        if self.temperature == 0:
            return logits.argmax(-1)
        return torch.multinomial((logits.float() / self.temperature).softmax(-1), 1)[:, 0]

    def _read(self, row: _Row, token: int) -> None:
        row.ended = token in self.end
        row.producing, row.found = self.starts.get(token, ""), []

    def _produce(self, number: int, row: _Row, hidden: Tensor) -> tuple[int, Tensor | None]:
        """The next code of a row's item, or the end token after the last one: its id in the text, and its embedding."""
        decoder = self.model.decoder(row.producing)
        if len(row.found) == decoder.item_tokens:
            name, row.producing = row.producing, ""
            self.codes[name][number].append(torch.tensor(row.found))
            return decoder.config.end_token_id, None
        code = self._pick(decoder.lm_head(hidden)[0])
        row.found.append(int(code))
        return decoder.config.token_id, decoder.lm_embed(code)[0]

    def result(self) -> Generated:
        for number, row in enumerate(self.rows):
            if not row.producing:
                continue
            self.codes[row.producing][number].append(torch.tensor(row.found))
        items = {
            name: [[self._item(name, codes) for codes in row] for row in rows] for name, rows in self.codes.items()
        }
        return Generated(torch.cat(self.columns, 1), items, self.codes)

    def _item(self, name: str, codes: Tensor) -> Tensor:
        return self.model.decoder(name).lm_generate(codes[None].to(self.model.device))[0]
