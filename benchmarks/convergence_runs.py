"""Trainings of the convergence study: how they were made and what came out, kept in a file between calls."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor

KEPT_PICTURES = 16
_TAIL = 20  # steps whose mean is the loss at the end


@dataclass(frozen=True)
class Setup:
    """How a model is trained, whatever the number of processes: AdamW without weight decay, a linear warm-up over
    `warmup` steps, then down to zero along half a cosine; gradients clipped to `largest_norm`."""

    steps: int = 200
    dtype: str = "float64"
    learning_rate: float = 3e-3
    warmup: int = 20
    epsilon: float = 1e-8
    largest_norm: float = 1.0


@dataclass(frozen=True)
class Score:
    """right of asked prompts; chance: of a guess. p: of as many or more by guessing. words: how often the first, second
    ... word of the answer is right; none of pictures."""

    task: str
    right: int
    asked: int
    chance: float
    words: tuple[int, ...] = ()

    @property
    def times_chance(self) -> float:
        return self.right / self.asked / self.chance

    @property
    def p(self) -> float:
        return float(binomtest(self.right, self.asked, self.chance, alternative="greater").pvalue)


@dataclass(frozen=True)
class Drawn:
    """A picture [3, side, side] in -1 .. 1 that was drawn for `name`, and whether it is nearest to the right one."""

    name: str
    picture: Tensor
    right: bool


@dataclass(frozen=True)
class Run:
    """One training. curve: losses by step. seconds: of all of it."""

    model: str
    processes: int
    setup: Setup
    curve: Sequence[dict[str, float]]
    scores: Sequence[Score]
    pictures: Sequence[Drawn]
    seconds: float

    @property
    def key(self) -> tuple[str, str, int]:
        return self.model, self.setup.dtype, self.processes

    def losses(self, name: str) -> list[float]:
        return [losses[name] for losses in self.curve if name in losses]

    def end(self, name: str) -> float:
        tail = self.losses(name)[-_TAIL:]
        return sum(tail) / len(tail)


def differences(first: Run, other: Run) -> list[float]:
    """The largest difference of any loss between two runs, by step."""
    return [max(abs(a[name] - b[name]) for name in a) for a, b in zip(first.curve, other.curve)]


def merged(old: Sequence[Run], new: Sequence[Run]) -> list[Run]:
    """All runs, a new one in the place of an old one of the same model, dtype and number of processes."""
    found = {run.key: run for run in (*old, *new)}
    return [found[key] for key in sorted(found)]


def save_runs(runs: Sequence[Run], file: Path) -> None:
    file.write_text("[\n" + ",\n".join(json.dumps(_to_json(run)) for run in runs) + "\n]\n")


def load_runs(file: Path) -> list[Run]:
    """Those that `save_runs` wrote; none if there is no file. Of their pictures, 8 bits a value."""
    return [_from_json(found) for found in json.loads(file.read_text())] if file.exists() else []


def _to_json(run: Run) -> dict[str, Any]:
    return {
        "model": run.model,
        "processes": run.processes,
        "setup": asdict(run.setup),
        "seconds": round(run.seconds),
        "scores": [asdict(score) for score in run.scores],
        "curves": {name: run.losses(name) for name in run.curve[0]},
        "pictures": [
            {"name": one.name, "right": one.right, "side": one.picture.shape[-1], "rgb": _packed(one.picture)}
            for one in run.pictures[:KEPT_PICTURES]
        ],
    }


def _from_json(found: dict[str, Any]) -> Run:
    names = list(found["curves"])
    return Run(
        found["model"],
        found["processes"],
        Setup(**found["setup"]),
        [dict(zip(names, losses)) for losses in zip(*found["curves"].values(), strict=True)],
        [Score(**score | {"words": tuple(score["words"])}) for score in found["scores"]],
        [Drawn(p["name"], _unpacked(p["rgb"], p["side"]), p["right"]) for p in found["pictures"]],
        found["seconds"],
    )


def _packed(picture: Tensor) -> str:
    values = ((picture.detach().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return base64.b64encode(values.numpy().tobytes()).decode()


def _unpacked(text: str, side: int) -> Tensor:
    values = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
    return values.reshape(3, side, side) / 127.5 - 1
