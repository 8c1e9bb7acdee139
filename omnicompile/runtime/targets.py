"""How many targets a batch has, for losses that are means over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable


class TargetCount(int):
    """Target tokens of all losses together. by_loss: of each, where a model has several."""

    by_loss: tuple[int, ...]

    def __new__(cls, by_loss: Sequence[int]) -> TargetCount:
        count = super().__new__(cls, sum(by_loss))
        count.by_loss = tuple(by_loss)
        return count


@runtime_checkable
class SeveralLosses(Protocol):
    """A model whose loss is a weighted sum of means, each over its own targets, which its output names (`losses`)."""

    def target_counts(self, batch: Mapping[str, Any]) -> dict[str, int]:
        """Targets of every loss that there may be, by name, in one order for all batches."""

    def loss_weight(self, name: str) -> float: ...
