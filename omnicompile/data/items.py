"""Items of fixed size among the features of samples: how many placeholders one takes, and dummies in their place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from inspect import signature

import torch
from torch import Tensor, nn

from omnicompile.capture.inputs.types import StatesInputs
from omnicompile.data.budget import SOUNDS, Budget
from omnicompile.data.encode import GRIDS, PATCHES, Encoded
from omnicompile.errors import InputError
from omnicompile.runtime.fixed_items import FixedItems, placeholders


def item_arguments(model: nn.Module) -> set[str]:
    """The forward's arguments that may hold items of fixed size: those that come without the grids of packed ones."""
    arguments = set(signature(model.forward).parameters)
    grids = dict(zip(PATCHES, GRIDS))
    return {
        name
        for name, placeholder in placeholders(model).items()
        if (name in arguments or isinstance(model, StatesInputs))
        and not placeholder.grid
        and grids.get(name) not in arguments
    }


@dataclass
class ItemTokens:
    """Looks at samples for what items of each argument of `model` have in common."""

    model: nn.Module
    _seen: dict[str, set[tuple[torch.Size, int | None]]] = field(default_factory=dict)

    def watched(self, samples: Iterable[Encoded]) -> Iterator[Encoded]:
        """The same samples, looked at as they pass."""
        known = placeholders(self.model)
        for sample in samples:
            for name, count in sample.size.items:
                if name in known and count:
                    tokens = _tokens_of_one(sample, known[name].token, count)
                    self._seen.setdefault(name, set()).add((sample.features[name].shape[1:], tokens))
            yield sample

    @property
    def found(self) -> dict[str, int]:
        """Placeholders of one item by argument; 0 where items differ in them or in shape, or have sizes of their own
        beside them, so that none can be made up. Of sound such clips are left out: they are counted by their frames."""
        tokens = {name: (next(iter(kinds))[1] or 0) if len(kinds) == 1 else 0 for name, kinds in self._seen.items()}
        return {name: count for name, count in tokens.items() if count or name not in SOUNDS}


def _tokens_of_one(sample: Encoded, token: int, count: int) -> int | None:
    """Of one of its `count` items; None where they differ, or another tensor has a row of numbers for each (a mask, the
    size of an image)."""
    described = any(not v.is_floating_point() and v.shape[:1] == (count,) for v in sample.features.values())
    total = int((sample.ids == token).sum())
    return None if described or total % count else total // count


def dummy_items(model: nn.Module, budget: Budget, samples: Iterable[Encoded]) -> tuple[FixedItems, ...]:
    """What fills up rows of the budget, by items of `samples`, of which only as many are read as it takes. Raises
    InputError where no sample has an item that the budget holds."""
    wanted = {item.name: item for item in budget.items if item.tokens and item.count}
    found: dict[str, Tensor] = {}
    for sample in samples:
        found = {name: sample.features[name] for name in wanted if name in sample.features} | found
        if len(found) == len(wanted):
            break
    if missing := [item for name, item in wanted.items() if name not in found]:
        raise InputError(
            f"the budget has {missing[0].count} {missing[0].word}, but no sample has any: leave them out of the "
            "budget, or give other samples"
        )
    known = placeholders(model)
    return tuple(
        FixedItems.of(name, item.count, found[name][0], known[name].token, item.tokens) for name, item in wanted.items()
    )
