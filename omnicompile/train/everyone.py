"""Small sums over all ranks, on the host; a single process is a group of one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from omnicompile.runtime.parallel_module import ParallelModule
from omnicompile.runtime.watch import Watch

Item = TypeVar("Item")


@dataclass(frozen=True)
class Everyone:
    """group: of all ranks, None for a single process. copies: ranks that work on the same micro-batch. watch: over the
    other ranks, so that one that is gone is named."""

    group: dist.ProcessGroup | None = None
    rank: int = 0
    world: int = 1
    copies: int = 1
    watch: Watch | None = None

    @staticmethod
    def of(module: nn.Module) -> Everyone:
        if not isinstance(module, ParallelModule):
            return Everyone()
        mesh = module.engine.mesh
        return Everyone(mesh.control, mesh.rank, mesh.mesh.world, mesh.mesh.sp, mesh.watch)

    def sum(self, values: Sequence[float]) -> list[float]:
        return self._reduced(values, dist.ReduceOp.SUM)

    def largest(self, values: Sequence[float]) -> list[float]:
        return self._reduced(values, dist.ReduceOp.MAX)

    def guard(self, what: str) -> AbstractContextManager[None]:
        """Around what only all ranks together can do (see runtime/watch.py)."""
        return nullcontext() if self.watch is None else self.watch.guard(what)

    def guarded(self, source: Iterable[Item], what: str) -> Iterator[Item]:
        """The items of `source`, each got under the guard."""
        items = iter(source)
        while True:
            with self.guard(what):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def _reduced(self, values: Sequence[float], how: dist.ReduceOp.RedOpType) -> list[float]:
        vector = torch.tensor(list(values), dtype=torch.float64)
        if self.group is not None:
            with self.guard("the end of the step"):
                dist.all_reduce(vector, how, group=self.group)
        return vector.tolist()
