"""Tasks with something to learn: shapes and colours to name and to draw, changes in videos, pitches of tones."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from omnicompile.omni import Item, OmniModel, Text

COLOURS = {
    "red": (1.0, -1.0, -1.0), "green": (-1.0, 1.0, -1.0), "blue": (-1.0, -1.0, 1.0), "yellow": (1.0, 1.0, -1.0),
    "cyan": (-1.0, 1.0, 1.0), "pink": (1.0, -1.0, 1.0), "white": (1.0, 1.0, 1.0), "grey": (0.0, 0.0, 0.0),
}  # fmt: skip
FEW_COLOURS = tuple(COLOURS)[:4]  # that are drawn, and in videos
SHAPES = ("square", "cross", "bar", "frame")
PITCHES = ("lowest", "deep", "low", "middle", "raised", "high", "shrill", "highest")
NAMES = tuple(itertools.product(FEW_COLOURS, SHAPES))  # of what is drawn
NEXT = dict(zip(PITCHES, (*PITCHES[1:], PITCHES[0])))
_READ = tuple(itertools.product(COLOURS, SHAPES))
_WORDS = [
    "<pad>",
    "<bos>",
    "<eos>",
    "what",
    "is",
    "this",
    "draw",
    "a",
    "first",
    "then",
    "sound",
    "of",
    "comes",
    "after",
]
_NOISE = 0.1

Sample = list[Text | Item]


@dataclass(frozen=True)
class Task:
    """name: for reports. make: a sample and its right answer. answers: how many different ones there are, all equally
    likely. draws: the answer is a picture; otherwise text."""

    name: str
    make: Callable[[OmniModel, torch.Generator], tuple[Sample, str]]
    answers: int
    draws: bool = False

    @property
    def chance(self) -> float:
        """That a guess is right, whatever it goes by, if every answer is asked for equally often."""
        return 1 / self.answers

    def prompts(self, model: OmniModel, count: int, seed: int) -> list[tuple[Sample, str]]:
        """Samples in which every answer comes equally often. Raises ValueError where `count` does not allow it."""
        if count % self.answers:
            raise ValueError(f"{count} prompts cannot ask for {self.answers} answers equally often")
        generator = torch.Generator().manual_seed(seed)
        found: dict[str, list[tuple[Sample, str]]] = {}
        while sum(map(len, found.values())) < count:
            sample, answer = self.make(model, generator)
            if len(same := found.setdefault(answer, [])) < count // self.answers:
                same.append((sample, answer))
        return [asked for same in zip(*found.values()) for asked in same]


def tokenizer(special: dict[str, int]) -> PreTrainedTokenizerFast:
    """Of whole words, with the model's special tokens at their ids."""
    words = [*_WORDS, *COLOURS, *SHAPES, *PITCHES]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)} | special, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def draw(colour: str, shape: str, side: int, at: tuple[int, int] = (0, 0), size: int = 0) -> Tensor:
    """[3, side, side] in -1 .. 1: a shape of `size` (half of the side) at row and column `at` from the middle."""
    size = size or side // 2
    cells = torch.zeros(size, size, dtype=torch.bool)
    middle = slice(size // 2 - size // 4, size // 2 + size // 4)
    if shape in ("square", "frame"):
        cells[:] = True
    if shape == "frame":
        cells[size // 4 : -(size // 4), size // 4 : -(size // 4)] = False
    if shape in ("bar", "cross"):
        cells[middle] = True
    if shape == "cross":
        cells[:, middle] = True
    picture = torch.full((3, side, side), -1.0)
    row, column = (side - size) // 2 + at[0], (side - size) // 2 + at[1]
    window = picture[:, row : row + size, column : column + size]
    window[:, cells] = torch.tensor(COLOURS[colour])[:, None].expand(-1, int(cells.sum()))
    return picture


def _choice(generator: torch.Generator, options: tuple) -> object:
    return options[int(torch.randint(len(options), (), generator=generator))]


def _noisy(picture: Tensor, generator: torch.Generator) -> Tensor:
    return picture + _NOISE * torch.randn(picture.shape, generator=generator)


def _side(model: OmniModel) -> int:
    encoder = model.encoder("image")
    return 16 if encoder.config.packed else encoder.item_shape[-1]


def _text(model: OmniModel, generator: torch.Generator) -> tuple[Sample, str]:
    pitch = _choice(generator, PITCHES)
    return [Text(f"<bos> what comes after {pitch}", False), Text(f"{NEXT[pitch]} <eos>")], NEXT[pitch]


def _seen(model: OmniModel, generator: torch.Generator) -> tuple[int, tuple[int, int], int]:
    """Side, place and size of a shape to read."""
    side = _side(model)
    down, right = torch.randint(-2, 3, (2,), generator=generator).tolist()
    return side, (down, right), 3 * side // 4


def _image(model: OmniModel, generator: torch.Generator) -> tuple[Sample, str]:
    colour, shape = _choice(generator, _READ)
    picture = _noisy(draw(colour, shape, *_seen(model, generator)), generator)
    answer = f"{colour} {shape}"
    return [Text("<bos> what is this a", False), Item("image", picture), Text(f"{answer} <eos>")], answer


def _video(model: OmniModel, generator: torch.Generator) -> tuple[Sample, str]:
    """Four frames of a shape that has another colour from the second, third or fourth on, or the same."""
    before, after = _choice(generator, FEW_COLOURS), _choice(generator, FEW_COLOURS)
    shape, where = _choice(generator, SHAPES), _seen(model, generator)
    change = 1 + int(torch.randint(3, (), generator=generator))
    frames = [draw(before if i < change else after, shape, *where) for i in range(4)]
    video, answer = _noisy(torch.stack(frames), generator), f"{before} {after}"
    return [Text("<bos> what is first then", False), Item("image", video), Text(f"{answer} <eos>")], answer


def _sound(model: OmniModel, generator: torch.Generator) -> tuple[Sample, str]:
    bins, frames = model.encoder("audio").item_shape
    number = int(torch.randint(len(PITCHES), (), generator=generator))
    spectrum = torch.zeros(bins, frames)
    spectrum[number * bins // len(PITCHES)] = 2.0
    item = Item("audio", _noisy(spectrum, generator))
    return [Text("<bos> sound of", False), item, Text(f"{PITCHES[number]} <eos>")], PITCHES[number]


def _drawing(model: OmniModel, generator: torch.Generator) -> tuple[Sample, str]:
    colour, shape = _choice(generator, NAMES)
    picture = draw(colour, shape, model.decoder("image").item_shape[-1])
    prompt = Text(f"<bos> draw a {colour} {shape}", False)
    return [prompt, Item("image", picture, produced=True), Text("<eos>")], f"{colour} {shape}"


TASKS = (
    Task("text", _text, len(PITCHES)),
    Task("image", _image, len(_READ)),
    Task("video", _video, len(FEW_COLOURS) ** 2),
    Task("audio", _sound, len(PITCHES)),
    Task("drawing", _drawing, len(NAMES), draws=True),
)


def tasks_of(model: OmniModel) -> tuple[Task, ...]:
    """Those that the model can take part in; videos need an encoder that packs frames."""
    names = {"text", "image", "drawing"}
    names |= {"video"} if model.encoder("image").config.packed else set()
    names |= {"audio"} if "audio" in (model.config.encoders or []) else set()
    return tuple(task for task in TASKS if task.name in names)
