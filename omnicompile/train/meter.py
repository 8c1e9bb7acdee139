"""How fast a run is, by the tokens that it really trains on."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from omnicompile.train.everyone import Everyone
from omnicompile.train.flops import StepFlops, Work, mfu

WorkOf = Callable[[Sequence[Mapping[str, Any]]], Work]


@dataclass(frozen=True)
class Cost:
    """Turns micro-batches into FLOPs. peak: FLOP/s of one GPU; None where there is none."""

    flops: StepFlops
    work_of: WorkOf
    peak: float | None

    def __call__(self, batches: Sequence[Mapping[str, Any]]) -> float:
        return self.flops(self.work_of(batches))


@dataclass(frozen=True)
class Speed:
    """Since the last reading. tokens: over all ranks. seconds: of one step, the mean. tokens_per_second: per GPU."""

    tokens: int
    seconds: float
    tokens_per_second: float
    mfu: float | None
    memory: int


class Meter:
    """Adds up steps until they are read. Waiting for data counts, checkpoints and evaluations do not.

    cost: None where FLOPs are not known; then there is no MFU.
    """

    def __init__(self, everyone: Everyone, device: torch.device, cost: Cost | None = None) -> None:
        self._everyone, self._device, self._cost = everyone, device, cost
        self.clear()

    def clear(self) -> None:
        self._steps, self._tokens, self._seconds, self._flops = 0, 0, 0.0, 0.0

    def add(self, tokens: int, seconds: float, batches: Sequence[Mapping[str, Any]]) -> None:
        """tokens: of the step over all ranks. batches: this rank's."""
        self._steps += 1
        self._tokens += tokens
        self._seconds += seconds
        if self._cost is not None and self._cost.peak is not None:
            self._flops += self._cost(batches)

    def read(self) -> Speed:
        """All ranks together. Starts anew."""
        (flops,) = self._everyone.sum([self._flops / self._everyone.copies])
        memory, seconds = self._everyone.largest([peak_memory(self._device), self._seconds])
        peak = None if self._cost is None else self._cost.peak
        found = Speed(
            tokens=self._tokens,
            seconds=seconds / max(1, self._steps),
            tokens_per_second=self._tokens / self._everyone.world / seconds if seconds else 0.0,
            mfu=mfu(flops, seconds, self._everyone.world, peak),
            memory=int(memory),
        )
        self.clear()
        return found


def peak_memory(device: torch.device) -> int:
    """Most bytes so far: of tensors on a GPU, of the whole process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
