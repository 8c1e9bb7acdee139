"""Even out what the packs of one step cost, and deal them out to data ranks and micro-steps.

Packs of one budget have the same matrix products, padding included; what differs is attention, which goes by the sum of
squared segment lengths, and how many of the patches and frames are real. All of it is integer arithmetic, so that all
ranks come to the same assignment. The order within a sample does not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np

from omnicompile.data.budget import Budget, Size
from omnicompile.data.packing import Pack

_SCALE = 1 << 10
_ROUNDS = 2  # exchanges in one step, for each pack
_PARTNERS = 16  # packs, the cheapest first, that the costliest one may exchange with
_LARGEST, _SUBSETS = 3, 200  # items that change places at once, and ways to choose them that are looked at


@dataclass(frozen=True)
class Weights:
    """Cost of a squared segment length in text and in the encoder, relative to each other: `attention_weights`."""

    text: int = 1
    vision: int = 1

    @staticmethod
    def of(text: int, vision: int) -> Weights:
        """In proportion, as numbers so small that costs stay within 64 bits."""
        largest = max(text, vision, 1)
        return Weights(*(-(-value * _SCALE // largest) for value in (text, vision)))

    def cost(self, size: Size) -> int:
        return self.text * size.tokens**2 + self.vision * size.squares


def attention_cost(pack: Pack, weights: Weights, budget: Budget) -> int:
    """Of a pack with the padding that fills it up, which attends to itself."""
    sizes = [item.size for item in pack]
    spare = Size(budget.tokens - sum(s.tokens for s in sizes), (budget.patches - sum(s.patches for s in sizes),))
    return sum(map(weights.cost, sizes)) + weights.cost(spare)


def exchange(packs: Sequence[Pack], weights: Weights, budget: Budget) -> list[Pack]:
    """The same items in packs whose costs differ less: a few items change places with a few of another pack, as long as
    both still fit the budget. Goes by the packs alone, not by the number of ranks."""
    result = [_Counted.of(pack, weights, budget) for pack in packs]
    if len(result) < 2 or not any(packs):
        return [list(pack) for pack in packs]
    means = np.maximum(np.sum([pack.load for pack in result], axis=0) // len(result), 1)
    for _ in range(_ROUNDS * len(result)):
        order = sorted(range(len(result)), key=lambda i: (-int(result[i].load[0]), i))
        high = order[0]
        for low in list(reversed(order[1:]))[:_PARTNERS]:
            better = _improved(result[high], result[low], means)
            if better is not None:
                result[high], result[low] = (_Counted.of(pack, weights, budget) for pack in better)
                break
        else:
            break
    return [list(pack.items) for pack in result]


@dataclass(frozen=True)
class _Counted:
    """A pack in numbers. values: [items, dims]: what each needs of the budget, then its attention cost and its tokens.
    spare: of the budget. load: [3] attention cost with padding, patches, frames."""

    items: Pack
    values: np.ndarray
    spare: np.ndarray
    load: np.ndarray
    weights: Weights
    budget: Budget

    @staticmethod
    def of(pack: Pack, weights: Weights, budget: Budget) -> _Counted:
        rows = [(*budget.needs(i.size), weights.cost(i.size), i.size.tokens) for i in pack]
        values = np.array(rows, dtype=np.int64).reshape(len(pack), len(budget.room) + 2)
        total = values.sum(0)
        load = _load_of(total[None], weights, budget)[0]
        return _Counted(pack, values, np.array(budget.room) - total[:-2], load, weights, budget)

    def subsets(self) -> tuple[list[tuple[int, ...]], np.ndarray]:
        """Small subsets of the items, the empty one first, and what each sums up to [subsets, dims]."""
        found: list[tuple[int, ...]] = [()]
        for size in range(1, _LARGEST + 1):
            if len(found) + comb(len(self.items), size) > _SUBSETS:
                break
            found += combinations(range(len(self.items)), size)
        return found, np.array([self.values[list(subset)].sum(0) for subset in found])


def _load_of(totals: np.ndarray, weights: Weights, budget: Budget) -> np.ndarray:
    """[..., 3] attention cost with that of the padding, patches, frames of packs whose items sum up to `totals`."""
    padding = weights.text * (budget.tokens - totals[..., -1]) ** 2
    padding = padding + weights.vision * (budget.patches - totals[..., 1]) ** 2
    return np.stack([totals[..., -2] + padding, totals[..., 1], totals[..., 2]], -1)


def _improved(high: _Counted, low: _Counted, means: np.ndarray) -> tuple[Pack, Pack] | None:
    """The two packs after the exchange that evens them out most; None if none does."""

    def unevenness(load: np.ndarray) -> np.ndarray:
        return ((load * _SCALE // means) ** 2).sum(-1)

    (given, leaving), (taken, coming) = high.subsets(), low.subsets()
    change = coming[None, :] - leaving[:, None]  # [given, taken, dims]: what `high` gains and `low` loses
    fits = (change[..., :-2] <= high.spare).all(-1) & (-change[..., :-2] <= low.spare).all(-1)
    give, take = np.nonzero(fits)
    if not len(give):
        return None
    moved = change[give, take]
    after = unevenness(_load_of(high.values.sum(0) + moved, high.weights, high.budget))
    after = after + unevenness(_load_of(low.values.sum(0) - moved, low.weights, low.budget))
    best = int(after.argmin())
    if int(after[best]) >= int(unevenness(high.load) + unevenness(low.load)):
        return None
    out, into = set(given[give[best]]), set(taken[take[best]])
    new_high = [item for n, item in enumerate(high.items) if n not in out] + [low.items[n] for n in sorted(into)]
    new_low = [item for n, item in enumerate(low.items) if n not in into] + [high.items[n] for n in sorted(out)]
    if not all(high.budget.deals(item.size for item in pack) for pack in (new_high, new_low)):
        return None
    return new_high, new_low


def deal(packs: Sequence[Pack], ranks: int, weights: Weights, budget: Budget) -> list[list[Pack]]:
    """[ranks][micro-steps] packs. Ranks wait for each other in every micro-step, so packs of like cost share one;
    within it the costliest goes to the rank that has had least. `ranks` divides the number of packs."""
    order = sorted(range(len(packs)), key=lambda i: (-attention_cost(packs[i], weights, budget), i))
    found: list[list[Pack]] = [[] for _ in range(ranks)]
    totals = [0] * ranks
    for start in range(0, len(order), ranks):
        receivers = sorted(range(ranks), key=lambda rank: (totals[rank], rank))
        for rank, number in zip(receivers, order[start : start + ranks]):
            found[rank].append(packs[number])
            totals[rank] += attention_cost(packs[number], weights, budget)
    return found


def deal_in_order(packs: Sequence[Pack], ranks: int) -> list[list[Pack]]:
    """[ranks][micro-steps] packs, as they come."""
    return [list(packs[rank::ranks]) for rank in range(ranks)]
