"""A loader over batches in memory, and a sink that keeps what it is told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tiny_models import text_batch

from omnicompile.train.records import EvaluationRecord, StepRecord


@dataclass(frozen=True)
class MemoryStep:
    micro_batches: list[dict[str, Any]]
    step: int
    epoch: int
    fill: dict[str, float]
    real_tokens: int
    keys: list[tuple[int, int, int]]


class MemoryLoader:
    """Each epoch the same batches in order, `micro` for every data rank and step. The state counts batches, so that it
    means the same to any number of ranks."""

    def __init__(self, batches: Sequence[Mapping[str, Any]], micro: int, rank: int = 0, ranks: int = 1) -> None:
        self.batches, self.micro, self.rank, self.ranks = list(batches), micro, rank, ranks
        self.epoch, self.place, self.step = 0, 0, 0

    def __iter__(self) -> Iterator[MemoryStep]:
        size = self.micro * self.ranks
        while self.place + size <= len(self.batches):
            numbers = range(self.place, self.place + size)
            mine = [dict(self.batches[n]) for n in list(numbers)[self.rank :: self.ranks]]
            tokens = sum(self.batches[n]["input_ids"].numel() for n in numbers)
            keys = [(self.epoch, n, 0) for n in numbers]
            self.place += size
            self.step += 1
            yield MemoryStep(mine, self.step - 1, self.epoch, {"tokens": 1.0}, tokens, keys)
        self.epoch, self.place = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "place": self.place, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.place, self.step = state["epoch"], state["place"], state["step"]


def text_loader(count: int, micro: int, rank: int = 0, ranks: int = 1, length: int = 16) -> MemoryLoader:
    return MemoryLoader([text_batch(seed, length) for seed in range(count)], micro, rank, ranks)


@dataclass
class Kept:
    """Everything that a run told."""

    steps: list[StepRecord] = field(default_factory=list)
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    events: list[tuple[str, str]] = field(default_factory=list)

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def evaluation(self, record: EvaluationRecord) -> None:
        self.evaluations.append(record)

    def event(self, name: str, text: str, values: Mapping[str, Any]) -> None:
        self.events.append((name, text))

    def close(self) -> None:
        pass

    @property
    def losses(self) -> list[float]:
        return [record.loss for record in self.steps]
