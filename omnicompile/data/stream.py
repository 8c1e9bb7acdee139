"""The order in which samples come: every epoch a permutation of its own, known from the seed alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Stream:
    """Sample numbers of a source with `length` samples, epoch after epoch. Position p is in epoch p // length."""

    length: int
    seed: int
    shuffle: bool
    epochs: int | None
    _orders: dict[int, Tensor] = field(default_factory=dict)

    @property
    def end(self) -> int | None:
        """The position after the last one; None for a stream without end."""
        return None if self.epochs is None else self.epochs * self.length

    def at(self, position: int) -> tuple[int, int]:
        """(epoch, sample number)."""
        epoch, place = divmod(position, self.length)
        return epoch, int(self._order(epoch)[place]) if self.shuffle else place

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % (1 << 63))
            self._orders = {e: o for e, o in self._orders.items() if abs(e - epoch) <= 1}
            self._orders[epoch] = torch.randperm(self.length, generator=generator)
        return self._orders[epoch]
