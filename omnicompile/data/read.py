"""Reading and encoding samples, in this process or in worker processes."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

from omnicompile.data.budget import Budget, Size
from omnicompile.data.encode import Encoded, Encoder
from omnicompile.data.policy import Policy
from omnicompile.data.sample import BadSample, to_sample
from omnicompile.data.sources import Source, first_kind
from omnicompile.data.split import split
from omnicompile.errors import InputError, OmniCompileError

log = logging.getLogger("omnicompile.data")
_CACHE_BYTES = 1 << 29


@dataclass(frozen=True)
class Read:
    """A sample as it was read. parts: the sample, or its parts where it was split; sizes: of the parts. Else one of
    bad: why it cannot be read or encoded; long: why it does not fit the budget; error: what is wrong with the source or
    the encoder as such."""

    parts: tuple[Encoded, ...] = ()
    sizes: tuple[Size, ...] = ()
    bad: str = ""
    long: str = ""
    error: str = ""

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True)
class Reader(Dataset[Read]):
    """Samples of a source by number. kind: of the first sample ("messages" or "text"). whole: give the tensors, not the
    sizes alone."""

    source: Source
    encoder: Encoder
    kind: str
    budget: Budget
    over_long: Policy
    whole: bool = True

    def __getitem__(self, number: int) -> Read:
        try:
            return self._read(number)
        except BadSample as reason:
            return Read(bad=str(reason))
        except OmniCompileError as error:
            return Read(error=str(error))

    def _read(self, number: int) -> Read:
        sample = to_sample(self.source[number], self.kind, self.source.where(number))
        try:
            given = self.encoder(sample)
        except (BadSample, OmniCompileError):
            raise
        except (
            Exception
        ) as error:  # of the caller's encoder: a failure of this rank alone would leave the others waiting
            log.exception("the encoder failed on %s", self.source.where(number))
            return Read(error=f"the encoder failed: {type(error).__name__}: {error}")
        encoded = Encoded.of(given)
        parts: tuple[Encoded, ...] = (encoded,)
        if not self.budget.holds(encoded.size):
            if self.over_long is not Policy.SPLIT:
                return Read(long=self.budget.excess(encoded.size))
            try:
                parts = tuple(split(encoded, self.budget))
            except BadSample as reason:
                return Read(long=str(reason))
        return Read(parts if self.whole else (), tuple(part.size for part in parts))


class _Numbers(Sampler[int]):
    """What the workers are to read in the present pass."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def __iter__(self) -> Iterator[int]:
        return iter(list(self.numbers))

    def __len__(self) -> int:
        return len(self.numbers)


class Pool:
    """Reads lists of samples ahead: `start` a list, `finish` it later. workers: processes; 0 reads in `finish`."""

    def __init__(self, reader: Reader, workers: int, ahead: int = 64) -> None:
        self._reader = reader
        self._numbers = _Numbers()
        self._running: Iterator[Read] | None = None
        self._loader: DataLoader[Any] | None = None
        if workers:
            self._loader = DataLoader(
                reader,
                batch_size=None,
                sampler=self._numbers,
                num_workers=workers,
                prefetch_factor=max(2, -(-ahead // workers)),
                persistent_workers=True,
            )

    def start(self, numbers: Sequence[int]) -> None:
        if self._running is not None:  # what was read ahead for a state that has been replaced
            self.finish()
        self._numbers.numbers = list(numbers)
        self._running = iter(self._loader) if self._loader is not None and numbers else self._inline(list(numbers))

    def _inline(self, numbers: list[int]) -> Iterator[Read]:
        return (self._reader[number] for number in numbers)

    def finish(self) -> list[Read]:
        """What was started, in its order."""
        assert self._running is not None, "finish before start"
        found, self._running = list(self._running), None
        return found


class Cache:
    """Samples read lately, up to a number of bytes, so that what was read to be measured is not read again at once."""

    def __init__(self, limit: int = _CACHE_BYTES) -> None:
        self._limit, self._bytes = limit, 0
        self._kept: OrderedDict[int, Read] = OrderedDict()

    def __contains__(self, number: int) -> bool:
        return number in self._kept

    def put(self, number: int, read: Read) -> None:
        if number in self._kept or not read.parts:
            return
        self._kept[number] = read
        self._bytes += read.bytes
        while self._bytes > self._limit:
            self._bytes -= self._kept.popitem(last=False)[1].bytes

    def take(self, number: int) -> Read | None:
        read = self._kept.pop(number, None)
        self._bytes -= 0 if read is None else read.bytes
        return read


def sizes_only(read: Read) -> Read:
    return replace(read, parts=())


def sample_encoded(source: Source, encoder: Encoder, count: int, bad: Policy = Policy.REFUSE) -> Iterator[Encoded]:
    """`count` samples of a source, evenly spread over it; the same on every rank. Raises InputError for a source of
    mixed form, and, by the policy, for a sample that cannot be read."""
    kind = first_kind(source, bad)
    for place in range(min(count, len(source))):
        number = place * len(source) // min(count, len(source))
        try:
            found = Encoded.of(encoder(to_sample(source[number], kind, source.where(number))))
            found.size  # noqa: B018  (checks it)
        except BadSample as reason:
            if bad is Policy.REFUSE:
                raise InputError(
                    f"{source.where(number)}: {reason}; mend or remove it, or skip such samples"
                ) from reason
            continue
        yield found


def sample_sizes(source: Source, encoder: Encoder, count: int, bad: Policy = Policy.REFUSE) -> list[Size]:
    """Sizes of `sample_encoded`, for `suggest_budget`."""
    return [encoded.size for encoded in sample_encoded(source, encoder, count, bad)]
