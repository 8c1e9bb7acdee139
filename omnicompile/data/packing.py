"""Best-fit packing over several dimensions, out of a look-ahead buffer.

Everything is integer arithmetic on the sizes in the buffer, so that all ranks come to the same packs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from omnicompile.data.budget import Budget, Size

_SCALE = 1 << 12  # shares of the budget are whole numbers of 1 / _SCALE
_BOUNDS = 2  # the last of what the budget has: segments and images, of which a pack need not be full
_ROUNDS = 8
_TAIL = 3  # the last 1 / _TAIL of a budget is filled by what fits best


@dataclass(frozen=True)
class Item:
    """A sample, or a part of one that was split, in the stream. key: (epoch, index in the source, part)."""

    key: tuple[int, int, int]
    size: Size


Pack = list[Item]


def best_fit(buffer: Sequence[Item], budget: Budget) -> Pack:
    """A pack out of `buffer`, in the order of the stream. The oldest item is always in it, so that none waits for ever.
    Every item must fit into the budget alone."""
    if not buffer:
        return []
    needs = np.array([budget.needs(item.size) for item in buffer], dtype=np.int64)
    chosen = _one_pack(needs, np.array(budget.room, dtype=np.int64))
    while not budget.deals(buffer[i].size for i in chosen):  # the last ones wait; the oldest alone can be dealt out
        chosen.pop()
    return [buffer[i] for i in sorted(chosen)]


def _one_pack(needs: np.ndarray, room: np.ndarray) -> list[int]:
    free = np.ones(len(needs), dtype=bool)
    free[0] = False
    chosen, rest = [0], room - needs[0]
    # In the order of the stream as far as most of the budget: so every pack has its share of long and of short items.
    for index in np.flatnonzero(free):
        if not (needs[index] <= rest).all():
            continue
        if (_shares(rest - needs[index], room) < _SCALE // _TAIL)[room[:-_BOUNDS] > 0].any():
            break
        chosen.append(int(index))
        free[index] = False
        rest = rest - needs[index]
    while True:
        fits = np.flatnonzero(free & (needs <= rest).all(1))
        if not len(fits):
            break
        best = int(fits[_alignment(needs[fits], rest, room).argmax()])
        chosen.append(best)
        free[best] = False
        rest = rest - needs[best]
    return _exchanged(chosen, needs, room, free)


def _shares(values: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Of the counted dimensions, in 1 / _SCALE of the budget."""
    return values[..., :-_BOUNDS] * _SCALE // np.maximum(room[:-_BOUNDS], 1)


def _alignment(needs: np.ndarray, rest: np.ndarray, room: np.ndarray) -> np.ndarray:
    """How well items of `needs` [items, dims] go towards what is left: large ones in the direction of `rest` first."""
    return (_shares(needs, room) * _shares(rest, room)).sum(-1)


def _waste(rest: np.ndarray, room: np.ndarray) -> np.ndarray:
    return (_shares(rest, room) ** 2).sum(-1)


def _exchanged(chosen: list[int], needs: np.ndarray, room: np.ndarray, free: np.ndarray) -> list[int]:
    """Replace an item of the pack, but for the oldest, by another or by a pair while that leaves less of the budget."""
    for _ in range(_ROUNDS):
        rest = room - needs[chosen].sum(0)
        others = np.flatnonzero(free)
        if not len(others) or len(chosen) < 2 or _waste(rest, room) < (_SCALE // 200) ** 2:
            break
        best: tuple[int, int, tuple[int, ...]] | None = None
        for place in range(1, len(chosen)):
            gap = rest + needs[chosen[place]]
            more = _best_filling(needs, others, gap, room)
            if more is not None and (best is None or more[0] < best[0]):
                best = (more[0], place, more[1])
        if best is None or best[0] >= int(_waste(rest, room)):
            break
        free[chosen.pop(best[1])] = True
        chosen += best[2]
        free[list(best[2])] = False
    return chosen


def _best_filling(
    needs: np.ndarray, others: np.ndarray, gap: np.ndarray, room: np.ndarray
) -> tuple[int, tuple[int, ...]] | None:
    """(waste, items) of the one item, or the pair of it and one that fills it best, that leaves least of `gap`."""
    fits = others[(needs[others] <= gap).all(1)]
    if not len(fits):
        return None
    waste = _waste(gap - needs[fits], room)
    order = np.argsort(waste, kind="stable")
    best = int(waste[order[0]])
    items: tuple[int, ...] = (int(fits[order[0]]),)
    for first in fits[order[:_ROUNDS]]:
        rest = gap - needs[first]
        seconds = fits[(needs[fits] <= rest).all(1) & (fits != first)]
        if not len(seconds):
            continue
        waste = _waste(rest - needs[seconds], room)
        at = int(waste.argmin())
        if int(waste[at]) < best:
            best, items = int(waste[at]), (int(first), int(seconds[at]))
    return best, items


def greedy(buffer: Sequence[Item], budget: Budget) -> list[Pack]:
    """Packs in the order of the stream, a new one where the next item does not fit: what packing is compared with."""
    packs: list[Pack] = []
    rest: tuple[int, ...] = ()
    for item in buffer:
        needs = budget.needs(item.size)
        if not packs or any(need > room for need, room in zip(needs, rest)):
            packs.append([])
            rest = budget.room
        packs[-1].append(item)
        rest = tuple(room - need for need, room in zip(needs, rest))
    return packs


def fill(packs: Sequence[Pack], budget: Budget) -> dict[str, float]:
    """Real tokens, patches, frames and items as shares of what the budgets of `packs` hold; padding does not count."""
    sizes = [item.size for pack in packs for item in pack]
    totals = {
        "tokens": (budget.tokens, sum(s.tokens for s in sizes)),
        "patches": (budget.patches, sum(s.patches for s in sizes)),
        "frames": (budget.frames, sum(s.frames for s in sizes)),
    } | {item.word: (item.count, sum(s.count(item.name) for s in sizes)) for item in budget.items}
    return {name: real / (room * max(len(packs), 1)) for name, (room, real) in totals.items() if room}
