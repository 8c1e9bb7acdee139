"""What the ranks of a job do together around a checkpoint. A single process goes through the same code without a group.

The group is gloo and of its own: a save in the background must not mix its messages with those of the training step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from omnicompile.errors import CheckpointError, InputError, OmniCompileError

Result = TypeVar("Result")
TIMEOUT = timedelta(seconds=1800)
_OWN_ERRORS = {error.__name__: error for error in (CheckpointError, InputError)}


@dataclass(frozen=True)
class Failure:
    """What went wrong on a rank, in a form that travels."""

    kind: str
    text: str

    @staticmethod
    def of(error: BaseException) -> Failure:
        if isinstance(error, OmniCompileError):
            return Failure(type(error).__name__, str(error))
        return Failure("CheckpointError", f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")

    def error(self, prefix: str = "") -> OmniCompileError:
        return _OWN_ERRORS.get(self.kind, CheckpointError)(prefix + self.text)


@dataclass(frozen=True)
class Ranks:
    """All ranks of the job, in the order of their numbers. group: None for a single process."""

    group: dist.ProcessGroup | None

    @staticmethod
    def start() -> Ranks:
        """All ranks call it together."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return Ranks(None)
        return Ranks(dist.new_group(backend="gloo", timeout=TIMEOUT))

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    def first(self, work: Callable[[], Result]) -> Result:
        """The result of `work` on rank 0, on every rank. Raises on every rank what it raises there."""
        found: list[Any] = [None]
        if self.rank == 0:
            try:
                found = [work()]
            except Exception as error:
                found = [Failure.of(error)]
        if self.group is not None:
            dist.broadcast_object_list(found, group=self.group, group_src=0)
        if isinstance(found[0], Failure):
            raise found[0].error()
        return found[0]

    def gathered(self, mine: Any) -> list[Any]:
        """What every rank gives, by rank."""
        everyone: list[Any] = [mine]
        if self.group is not None:
            everyone = [None] * self.size
            dist.all_gather_object(everyone, mine, group=self.group)
        return everyone

    def agree(self, work: Callable[[], Result], told: Callable[[Result], str] = lambda result: "") -> Result:
        """This rank's own result of `work`. Raises on every rank if it raises on any, naming the first that failed, and
        InputError if `told` says different things of the results."""
        try:
            result = work()
            mine: str | Failure = told(result)
        except Exception as error:
            mine = Failure.of(error)
        everyone = self.gathered(mine)
        for rank, value in enumerate(everyone):
            if isinstance(value, Failure):
                raise value.error(f"rank {rank}: " if len(everyone) > 1 else "")
        different = [rank for rank, value in enumerate(everyone) if value != everyone[0]]
        if different:
            raise InputError(
                f"ranks 0 and {different[0]} disagree: {everyone[0][:200]!r} and {everyone[different[0]][:200]!r}"
            )
        return result
