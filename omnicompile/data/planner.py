"""Which samples make the packs of the next step: the same on every rank and for any number of ranks."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from omnicompile.data.budget import Budget, Size
from omnicompile.data.measure import Measured
from omnicompile.data.packing import Item, Pack, best_fit
from omnicompile.data.policy import Policy
from omnicompile.data.read import Read
from omnicompile.data.sources import Source
from omnicompile.data.stream import Stream
from omnicompile.errors import InputError

log = logging.getLogger("omnicompile.data")
VERSION = 1


@dataclass
class StepPlanner:
    """Fills a look-ahead buffer from the stream and packs out of it. Its state is position, buffer and counts.

    over_long, bad: policies. identity: of what a state belongs to. quiet: do not log what is skipped.
    """

    stream: Stream
    source: Source
    measured: Measured
    budget: Budget
    packs: int
    look_ahead: int
    over_long: Policy
    bad: Policy
    identity: str
    quiet: bool = False
    position: int = 0
    step: int = 0
    buffer: list[Item] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=lambda: {"over_long": 0, "bad": 0})

    def next(self) -> list[Pack]:
        """The packs of the next step, none of them empty; no packs after the end of the stream. Raises InputError by
        the policies."""
        packs = []
        for _ in range(self.packs):
            self._refill()
            pack = best_fit(self.buffer, self.budget)
            taken = {item.key for item in pack}
            self.buffer = [item for item in self.buffer if item.key not in taken]
            packs += [pack] if pack else []
        self.step += bool(packs)
        return packs

    def _refill(self) -> None:
        unused = 0
        while len(self.buffer) < self.look_ahead and self.position != self.stream.end:
            epoch, number = self.stream.at(self.position)
            items = self._items(epoch, number, self.measured.next())
            self.position += 1
            unused = 0 if items else unused + 1
            if unused >= self.stream.length:
                raise InputError(f"all {unused:,} samples of an epoch were skipped: none can be used")
            self.buffer += items

    def _items(self, epoch: int, number: int, read: Read) -> list[Item]:
        where = self.source.where(number)
        if read.error:
            raise InputError(read.error if read.error.startswith(where) else f"{where}: {read.error}")
        if read.bad:
            return self._skip("bad", self.bad, where, read.bad, "mend or remove it, or skip such samples (bad: skip)")
        if read.long:
            split = " and cannot be split" if self.over_long is Policy.SPLIT else ""
            reason = f"the sample is over the budget{split}: {read.long}"
            remedy = "raise the budget, or split or skip such samples (over_long: split, or skip)"
            return self._skip("over_long", self.over_long, where, reason, remedy)
        return [Item((epoch, number, part), size) for part, size in enumerate(read.sizes)]

    def _skip(self, kind: str, policy: Policy, where: str, reason: str, remedy: str) -> list[Item]:
        if policy is not Policy.SKIP:
            raise InputError(f"{where}: {reason}; {remedy}")
        self.skipped[kind] += 1
        if not self.quiet:
            log.warning("skipped %s: %s (%d so far)", where, reason, sum(self.skipped.values()))
        return []

    def state_dict(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "identity": self.identity,
            "position": self.position,
            "step": self.step,
            "buffer": [[*item.key, *item.size.to_list()] for item in self.buffer],
            "skipped": dict(self.skipped),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises InputError for a state of other data, or one with samples that do not fit the present budget."""
        if state.get("version") != VERSION:
            raise InputError(f"this state of the data is of version {state.get('version')}, not {VERSION}")
        if state["identity"] != self.identity:
            raise InputError(
                f"this state belongs to other data, or another order of it ({state['identity']}; here {self.identity}"
                "): give the same source, seed and shuffle"
            )
        buffer = [Item((e, n, p), Size.from_list(size)) for e, n, p, *size in state["buffer"]]
        if over := [item for item in buffer if not self.budget.holds(item.size)]:
            raise InputError(
                f"{self.source.where(over[0].key[1])}, read ahead under another budget, does not fit the present one: "
                f"{self.budget.excess(over[0].size)}; go on with the former budget"
            )
        self.buffer, self.position, self.step = buffer, int(state["position"]), int(state["step"])
        self.skipped = dict(state["skipped"])
        self.measured.restart(self.position)
