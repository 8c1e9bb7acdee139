"""How often what a trained omni model generates is right."""

from __future__ import annotations

from itertools import repeat

import torch
from convergence_data import NAMES, draw, tasks_of
from convergence_models import processor
from convergence_precision import in_dtype
from convergence_runs import Drawn, Score
from torch import Tensor

from omnicompile.omni import Item, OmniModel, Text

_SEED = 77_000_000  # of prompts, apart from those of training


def evaluate(model: OmniModel, prompts: int) -> tuple[list[Score], list[Drawn]]:
    """The score of every task, and what was drawn."""
    scores, pictures = [], []
    for task in tasks_of(model):
        made = task.prompts(model, prompts, _SEED)
        prompt, answers = _prompt(model, [sample for sample, _ in made]), [answer for _, answer in made]
        words: tuple[int, ...] = ()
        if task.draws:
            pictures += _drawn(model, prompt, answers)
            right = sum(one.right for one in pictures)
        else:
            got = _answers(model, prompt, answers)
            right = sum(one == want for one, want in zip(got, answers))
            places = range(len(answers[0].split()))
            words = tuple(sum(map(_same_word, got, answers, repeat(place))) for place in places)
        scores.append(Score(task.name, right, prompts, task.chance, words))
    return scores, pictures


def _same_word(got: str, want: str, place: int) -> bool:
    return got.split()[place : place + 1] == want.split()[place : place + 1]


def _prompt(model: OmniModel, samples: list[list[Text | Item]]) -> dict[str, Tensor]:
    """The samples up to what is to be predicted, a row for each; all have the same length."""
    made = processor(model)
    batches = []
    for sample in samples:
        given = [part for part in sample if not (part.produced if isinstance(part, Item) else part.trained)]
        batches.append(made([given]))
    return in_dtype(
        {name: torch.cat([b[name] for b in batches]) for name in batches[0] if name != "labels"}, model.dtype
    )


def _answers(model: OmniModel, prompt: dict[str, Tensor], wanted: list[str]) -> list[str]:
    """What the model goes on with, as many words as are wanted of it."""
    length, words = prompt["input_ids"].shape[1], len(wanted[0].split())
    ids = model.generate(**prompt, max_new_tokens=words).ids[:, length:]
    tokenizer = processor(model).tokenizer
    return [str(tokenizer.decode(row, skip_special_tokens=False)) for row in ids]


def _drawn(model: OmniModel, prompt: dict[str, Tensor], names: list[str]) -> list[Drawn]:
    decoder, ids = model.decoder("image"), prompt["input_ids"]
    start = torch.full((ids.shape[0], 1), decoder.config.start_token_id)
    got = model.generate(torch.cat([ids, start], 1), max_new_tokens=decoder.item_tokens)
    known = torch.stack([draw(colour, shape, decoder.item_shape[-1]) for colour, shape in NAMES]).to(model.dtype)
    found = []
    for name, (picture,) in zip(names, got.items["image"]):
        nearest = int((known - picture).flatten(1).norm(dim=1).argmin())
        found.append(Drawn(name, picture, " ".join(NAMES[nearest]) == name))
    return found
