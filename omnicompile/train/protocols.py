"""What the trainer needs of a loader and of a checkpointer, so that one's own will do as well."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer


class Step(Protocol):
    """What one optimizer step trains on, as omnicompile.data.Step. micro_batches: this data rank's. epoch: from 0.
    fill: what is real of the budget of all ranks, as shares by kind ("tokens", "patches"). real_tokens: over all ranks,
    without padding. keys: (epoch, sample number, part) of all ranks' samples."""

    @property
    def micro_batches(self) -> Sequence[dict[str, Any]]: ...
    @property
    def epoch(self) -> int: ...
    @property
    def fill(self) -> Mapping[str, float]: ...
    @property
    def real_tokens(self) -> int: ...
    @property
    def keys(self) -> Sequence[Sequence[int]]: ...


class Loader(Protocol):
    """Iterating it gives the steps that are left, of all epochs or of the present one; again, what comes after them.
    The state is JSON-able, the same on every rank, and that after the last step that was given."""

    def __iter__(self) -> Iterator[Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Restored(Protocol):
    @property
    def step(self) -> int: ...
    @property
    def extra(self) -> Mapping[str, Any]: ...


class Checkpointer(Protocol):
    """`save` may write in the background; `wait` returns when it is on disk."""

    def save(self, step: int, module: nn.Module, optimizer: Optimizer, extra: Mapping[str, Any]) -> None: ...
    def wait(self) -> None: ...
    def latest(self) -> int | None: ...
    def load(self, module: nn.Module, optimizer: Optimizer, step: int | None = None) -> Restored: ...
