"""Seconds of a piece of work on a device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter, thread_time

import torch

Run = Callable[[int], object]
"""Does the work once; the argument counts the calls, so that operands can rotate."""

MOST_CALLS = 10_000
SLOW = 0.05
"""Seconds from which on three samples do."""


@dataclass(frozen=True)
class Timer:
    """repeats: samples; shortest: seconds that each takes at least, by as many calls as that needs. together: waits for
    the other ranks, so that all of them are at work at the same time. The quickest sample counts: others at work on the
    machine lengthen one, nothing shortens one. A thread alone is timed by its CPU time, which leaves out waiting for a
    core. longest: the most of a number over the ranks, which all take part in."""

    device: torch.device
    repeats: int
    shortest: float
    together: Callable[[], None]
    longest: Callable[[float], float] = float

    def seconds(self, run: Run) -> float:
        """Of one call."""
        run(0)
        once = self.longest(self._sample(run, 1, 1))
        calls = min(MOST_CALLS, max(1, math.ceil(self.shortest / max(once, 1e-7))))
        samples = []
        for repeat in range(self.repeats if once < SLOW else min(self.repeats, 3)):
            self.together()
            samples.append(self._sample(run, calls, 2 + repeat * calls) / calls)
        return min(samples)

    def _sample(self, run: Run, calls: int, first: int) -> float:
        if self.device.type == "cuda":
            return self._on_gpu(run, calls, first)
        clock = thread_time if torch.get_num_threads() == 1 else perf_counter
        start = clock()
        for call in range(first, first + calls):
            run(call)
        return clock() - start

    def _on_gpu(self, run: Run, calls: int, first: int) -> float:
        """Between events on the stream, so that launching does not count where it is hidden."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        start.record()
        for call in range(first, first + calls):
            run(call)
        end.record()
        torch.cuda.synchronize(self.device)
        return float(start.elapsed_time(end)) * 1e-3
