"""How often what a trained omni model generates is right."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from convergence_data import NAMES, draw, tasks_of
from convergence_models import processor
from scipy.stats import binomtest
from torch import Tensor

from omnicompile.omni import Item, OmniModel, Text

_SEED = 77_000_000  # of prompts, apart from those of training


@dataclass(frozen=True)
class Score:
    """right of asked prompts; chance: of a guess. p: of as many or more by guessing."""

    task: str
    right: int
    asked: int
    chance: float

    @property
    def times_chance(self) -> float:
        return self.right / self.asked / self.chance

    @property
    def p(self) -> float:
        return float(binomtest(self.right, self.asked, self.chance, alternative="greater").pvalue)


@dataclass(frozen=True)
class Drawn:
    """A picture [3, side, side] that was drawn for `name`, and whether it is nearest to the right one."""

    name: str
    picture: Tensor
    right: bool


def evaluate(model: OmniModel, prompts: int) -> tuple[list[Score], list[Drawn]]:
    """The score of every task, and what was drawn."""
    scores, pictures = [], []
    for task in tasks_of(model):
        generator = torch.Generator().manual_seed(_SEED)
        made = [task.make(model, generator) for _ in range(prompts)]
        if task.draws:
            drawn = [_drawn(model, sample, answer) for sample, answer in made]
            pictures += drawn
            right = sum(one.right for one in drawn)
        else:
            right = sum(_answer(model, sample, len(answer.split())) == answer for sample, answer in made)
        scores.append(Score(task.name, right, prompts, task.chance))
    return scores, pictures


def _prompt(model: OmniModel, sample: list[Text | Item]) -> dict[str, Tensor]:
    """The sample up to what is to be predicted."""
    given = [part for part in sample if not (part.produced if isinstance(part, Item) else part.trained)]
    batch = processor(model)([given])
    del batch["labels"]
    return batch


def _answer(model: OmniModel, sample: list[Text | Item], words: int) -> str:
    batch = _prompt(model, sample)
    length = batch["input_ids"].shape[1]
    ids = model.generate(**batch, max_new_tokens=words).ids[0, length:]
    return str(processor(model).tokenizer.decode(ids, skip_special_tokens=False))


def _drawn(model: OmniModel, sample: list[Text | Item], name: str) -> Drawn:
    decoder, ids = model.decoder("image"), _prompt(model, sample)["input_ids"]
    start = torch.tensor([[decoder.config.start_token_id]])
    got = model.generate(torch.cat([ids, start], 1), max_new_tokens=decoder.item_tokens)
    picture = got.items["image"][0][0]
    known = torch.stack([draw(colour, shape, picture.shape[-1]) for colour, shape in NAMES])
    nearest = int((known - picture).flatten(1).norm(dim=1).argmin())
    return Drawn(name, picture, " ".join(NAMES[nearest]) == name)
