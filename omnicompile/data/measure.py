"""The sizes of samples, in the order of the stream, known to all ranks.

Ranks measure in turns: of every stretch of the stream each reads its share, and they exchange sizes. A sample that the
same rank later trains on is not read again if it is still in its cache.
"""

from __future__ import annotations

from collections import deque

import torch.distributed as dist

from omnicompile.data.read import Cache, Pool, Read, sizes_only
from omnicompile.data.stream import Stream
from omnicompile.errors import InputError

_MOST_KNOWN = (
    1 << 20
)  # samples whose sizes are kept for later epochs; the same on all ranks, as what they measure must be


class Measured:
    """Gives `Read`s without tensors, position by position. chunk: positions of one exchange. group: of all ranks, for
    objects (gloo); None: every rank measures everything."""

    def __init__(
        self, stream: Stream, pool: Pool, cache: Cache, chunk: int, group: dist.ProcessGroup | None, identity: str
    ) -> None:
        self._stream, self._pool, self._cache = stream, pool, cache
        self._chunk, self._group, self._identity = chunk, group, identity
        self._known: dict[int, Read] = {}
        self.restart(0)

    def restart(self, position: int) -> None:
        """Go on at `position`."""
        self._ready: deque[Read] = deque()
        self._started: list[int] | None = None  # samples that are being measured
        self._ahead: list[int] = []  # the stretch that they are in
        self._next = position

    def next(self) -> Read:
        """Of the next position. With a group a collective, once for every stretch."""
        if not self._ready:
            if self._started is None:
                self._start()
            self._finish()
            self._start()  # workers measure the next stretch in the meantime
        return self._ready.popleft()

    def _start(self) -> None:
        end = self._next + self._chunk if self._stream.end is None else min(self._next + self._chunk, self._stream.end)
        self._ahead = [self._stream.at(position)[1] for position in range(self._next, end)]
        self._next = end
        self._started = sorted({number for number in self._ahead if number not in self._known})
        if self._started:
            self._pool.start(self._mine(self._started))

    def _mine(self, numbers: list[int]) -> list[int]:
        if self._group is None:
            return numbers
        return numbers[dist.get_rank(self._group) :: dist.get_world_size(self._group)]

    def _finish(self) -> None:
        found: dict[int, Read] = {}
        if self._started:
            mine = dict(zip(self._mine(self._started), self._pool.finish()))
            for number, read in mine.items():
                self._cache.put(number, read)
            found = self._exchanged({number: sizes_only(read) for number, read in mine.items()})
        # What is known already is not in `found`, and never forgotten, so it is still known.
        self._ready.extend(found[n] if n in found else self._known[n] for n in self._ahead)
        if len(self._known) + len(found) <= _MOST_KNOWN:
            self._known |= found
        self._started = None

    def _exchanged(self, mine: dict[int, Read]) -> dict[int, Read]:
        if self._group is None:
            return mine
        gathered: list[tuple[str, int, dict[int, Read]] | None] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(gathered, (self._identity, self._next, mine), group=self._group)
        parts = [part for part in gathered if part is not None]
        if len({part[:2] for part in parts}) > 1:
            raise InputError(
                "ranks read different data or are at different places in it: give every rank the same source, budget, "
                "seed and state"
            )
        return {number: read for part in parts for number, read in part[2].items()}
