"""The peak of memory over timed allocations, some of which repeat many times."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

_Array = NDArray[np.float64]


@dataclass(slots=True)
class Events:
    """Allocations (positive) and frees (negative), in bytes, each at a time in seconds."""

    times: list[float] = field(default_factory=list)
    deltas: list[float] = field(default_factory=list)

    def add(self, time: float, delta: float) -> None:
        self.times.append(time)
        self.deltas.append(delta)


@dataclass(slots=True)
class Repeat:
    """`events` happen again `count` times: event i at times[i] + m * steps[i] for m = 1 .. count."""

    events: Events
    steps: list[float]
    count: int


def peak(events: Events, repeats: list[Repeat]) -> float:
    """Highest running sum, at least 0. At one instant frees come before allocations."""
    once = (np.asarray(events.times), np.asarray(events.deltas))
    spans = [(_first(repeat), _last(repeat)) for repeat in repeats]
    parts = [once]
    for i, repeat in enumerate(repeats):
        others = spans[:i] + spans[i + 1 :]
        parts.append(_compressed(repeat, once[0], others) or _all(repeat))
    times = np.concatenate([part[0] for part in parts])
    if not times.size:
        return 0.0
    deltas = np.concatenate([part[1] for part in parts])
    order = np.lexsort((deltas > 0, times))
    return max(0.0, float(np.cumsum(deltas[order]).max()))


def _first(repeat: Repeat) -> float:
    return min(time + step for time, step in zip(repeat.events.times, repeat.steps))


def _last(repeat: Repeat) -> float:
    return max(time + repeat.count * step for time, step in zip(repeat.events.times, repeat.steps))


def _all(repeat: Repeat) -> tuple[_Array, _Array]:
    """Every occurrence."""
    turns = np.arange(1, repeat.count + 1)[:, None]
    times = np.asarray(repeat.events.times) + turns * np.asarray(repeat.steps)
    return times.ravel(), np.tile(np.asarray(repeat.events.deltas), repeat.count)


def _compressed(repeat: Repeat, times_once: _Array, others: list[tuple[float, float]]) -> tuple[_Array, _Array] | None:
    """The occurrences without a stretch in the middle whose peak cannot be higher than what is before and after it.

    With one step for all events, memory over the repeats is periodic plus a constant growth per period, so its peak is
    in the first or the last whole period. A stretch of whole periods is left out, its growth put at its start. None
    where that does not hold: different steps, few repeats, or other events inside the stretch.
    """
    step = repeat.steps[0]
    times = repeat.events.times
    if repeat.count < 8 or step <= 0 or any(other != step for other in repeat.steps):
        return None
    begin = max(times) + 2 * step
    left_out = int((min(times) + (repeat.count - 1) * step - begin) // step)
    end = begin + left_out * step
    if left_out < 1 or bool(np.any((times_once > begin - step) & (times_once < end + step))):
        return None
    if any(first < end + step and last > begin - step for first, last in others):
        return None
    kept_times, kept_deltas = [begin], [left_out * sum(repeat.events.deltas)]
    for time, delta in zip(times, repeat.events.deltas):
        before = int((begin - time) // step)
        turns = [*range(1, before + 1), *range(before + left_out + 1, repeat.count + 1)]
        kept_times += [time + turn * step for turn in turns]
        kept_deltas += [delta] * len(turns)
    return np.asarray(kept_times), np.asarray(kept_deltas)
