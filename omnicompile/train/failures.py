"""What ranks of a job leave behind when they fail, and the one cause that is told."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from omnicompile.errors import OmniCompileError, RankError
from omnicompile.whole_file import write_whole

FOLDER = "OMNICOMPILE_FAILURES"
"""The environment variable that names the folder for `RankFailure`s."""


@dataclass(frozen=True)
class RankFailure:
    """code: of the process. told: one line; "" for a rank that a signal has ended as it should. follows: it is the echo
    of another rank's failure. moment: in seconds of the host's clock."""

    rank: int
    code: int
    told: str
    follows: bool
    moment: float

    @staticmethod
    def of(rank: int, error: BaseException) -> RankFailure:
        line = " ".join(str(error).split()) or type(error).__name__
        mendable = isinstance(error, OmniCompileError)
        text = line if mendable else f"{type(error).__name__}: {line}"
        return RankFailure(rank, 2 if mendable else 1, text, isinstance(error, RankError), time.time())

    def save(self, folder: Path) -> None:
        write_whole(folder / f"{self.rank}.json", json.dumps(asdict(self)))


def read_failures(folder: Path) -> list[RankFailure]:
    return [RankFailure(**json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json"))]


@dataclass(frozen=True)
class Cause:
    """Why a job has failed, in one line, and the exit code to give."""

    code: int
    text: str


def cause_of(told: list[RankFailure], codes: Mapping[int, tuple[int, int]]) -> Cause:
    """told: by the ranks themselves. codes: rank -> (exit code, below 0 the signal; process id), in the order in which
    they ended: those after the first may have been ended by the launcher.

    The first error that is no echo of another's comes first, then the rank that a signal has killed.
    """
    killed = [(rank, -code, pid) for rank, (code, pid) in codes.items() if code < 0]
    first = sorted((t for t in told if not t.follows), key=lambda t: (not t.told, t.moment, t.rank))
    if first and not first[0].told and all(number == signal.SIGTERM for _, number, _ in killed):
        return Cause(first[0].code, "")  # the launcher ends with SIGTERM those that are slower to leave
    if first and first[0].told:
        same = sum(t.told == first[0].told for t in first)
        every = "" if same == len(first) and same > 1 else f"rank {first[0].rank}: "
        return Cause(first[0].code, f"{every}{first[0].told}")
    if killed:
        rank, number, pid = killed[0]
        return Cause(1, f"rank {rank} (process {pid}) was killed by {_signal(number)}{_likely(number)}")
    if told:
        return Cause(2, min(told, key=lambda t: t.moment).told)
    ended = ", ".join(f"rank {rank} with code {code}" for rank, (code, _) in sorted(codes.items()))
    return Cause(1, f"a rank has ended without a word ({ended or 'none is known'}): see the lines above")


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _likely(number: int) -> str:
    return ": the host may be out of memory (see dmesg)" if number == 9 else ""
