"""What a training run tells: numbers of a step or an evaluation, and events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class StepRecord:
    """One line of progress. Since the line before: tokens_per_second (real tokens, per GPU), mfu and seconds (of one
    step); None where not known. fill: what is real of the budget, by kind ("tokens", "patches"). memory: most bytes of
    a process so far."""

    step: int
    steps: int | None
    epoch: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float
    tokens_per_second: float
    mfu: float | None
    memory: int
    fill: Mapping[str, float]
    losses: Mapping[str, float] = field(default_factory=dict)
    skipped: int = 0


@dataclass(frozen=True)
class EvaluationRecord:
    """loss: mean over all target tokens of the evaluated samples. losses: as the model names them, mean over steps."""

    step: int
    loss: float
    tokens: int
    seconds: float
    losses: Mapping[str, float] = field(default_factory=dict)


class Sink(Protocol):
    """Where records go. Only rank 0 has any."""

    def step(self, record: StepRecord) -> None: ...
    def evaluation(self, record: EvaluationRecord) -> None: ...
    def event(self, name: str, text: str, values: Mapping[str, Any]) -> None:
        """Something that happened ("checkpoint", "resumed", ...): as a sentence, and as values for programs."""
        ...

    def close(self) -> None: ...


class Report:
    """All sinks as one."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks

    def step(self, record: StepRecord) -> None:
        for sink in self._sinks:
            sink.step(record)

    def evaluation(self, record: EvaluationRecord) -> None:
        for sink in self._sinks:
            sink.evaluation(record)

    def event(self, name: str, text: str, **values: Any) -> None:
        for sink in self._sinks:
            sink.event(name, text, values)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


def scalars(record: StepRecord) -> dict[str, float]:
    """The numbers of a step for boards, by tag."""
    found = {
        "train/loss": record.loss,
        "train/lr": record.lr,
        "train/grad_norm": record.grad_norm,
        "speed/tokens_per_second_per_gpu": record.tokens_per_second,
        "speed/seconds_per_step": record.seconds,
        "data/epoch": float(record.epoch),
        "memory/peak_bytes": float(record.memory),
    }
    if record.mfu is not None:
        found["speed/mfu"] = record.mfu
    found |= {f"data/fill/{kind}": share for kind, share in record.fill.items()}
    return found | {f"train/loss/{name}": value for name, value in record.losses.items()}


def evaluation_scalars(record: EvaluationRecord) -> dict[str, float]:
    return {"evaluation/loss": record.loss} | {f"evaluation/loss/{n}": v for n, v in record.losses.items()}
