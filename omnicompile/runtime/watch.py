"""A rank that dies, fails or leaves ends the others with the cause named, instead of letting them wait.

Every rank's background thread writes a beat into the job's store, reads whether any rank has reported a failure, and
looks after the rank next to it. A step costs nothing: the store is touched once a second, by that thread.

- A rank that raises between collectives reports its error, and the others raise `RankError` with it.
- A collective that fails because its peer is gone is raised again as `RankError` naming the rank whose beats stopped.
- A rank that stands still (stopped, cut off from the network) is reported after `Patience.silence`.
- A rank that cannot raise, because it waits in a collective that nobody ends, prints the cause and exits with code 1.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from omnicompile.errors import OmniCompileError, RankError

_STORE_SECONDS = 20.0
_BROKEN = ("gloo/", "NCCL", "[c10d]", "Connection closed", "Connection reset", "Broken pipe", "Socket")


@dataclass(frozen=True)
class Patience:
    """In seconds. beat: between two signs of life. silence: without one, after which a rank counts as lost. settle:
    least time that beats are watched before a rank is called dead. grace: for a rank to raise by itself, after a
    failure is known."""

    beat: float = 1.0
    silence: float = 60.0
    settle: float = 4.0
    grace: float = 20.0


@dataclass
class _State:
    """What a rank's two threads share. steps: begun. inside: since when it is in a collective part; failure: of any
    rank, and since when it is known."""

    stop: threading.Event = field(default_factory=threading.Event)
    steps: int = 0
    inside: float | None = None
    failure: str = ""
    known: float = 0.0

    def learn(self, failure: str) -> None:
        if not self.failure:
            self.failure, self.known = failure, time.monotonic()


class _Board:
    """The keys of one job in the store."""

    def __init__(self, store: dist.Store, rank: int, world: int) -> None:
        self.store, self.rank, self.world = store, rank, world

    def beat(self, count: int, steps: int) -> None:
        self.store.set(f"beat/{self.rank}", f"{count} {steps} {socket.gethostname()} {os.getpid()}")

    def beats(self) -> list[tuple[str, ...]]:
        """By rank: (count, steps, host, process id); empty for a rank that was never here."""
        keys = [f"beat/{rank}" for rank in range(self.world)]
        return [tuple(self.read(key).split()) for key in keys]

    def read(self, key: str) -> str:
        """The value of `key`, "" if there is none."""
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def report(self, failure: str) -> str:
        """Make `failure` the job's, unless there is one. Returns the job's."""
        if not self.read("failure"):
            self.store.set("failure", failure)
        return self.read("failure")


class Watch:
    """This rank's watch over the others. store: reached by all ranks, with the same prefix."""

    def __init__(self, store: dist.Store, rank: int, world: int, patience: Patience = Patience()) -> None:
        self._state, self._patience = _State(), patience
        self._board = _Board(_own_connection(store), rank, world)
        self._board.beat(0, 0)
        arguments = (self._state, self._board, patience)
        thread = threading.Thread(target=_attend, args=arguments, name="omnicompile-watch", daemon=True)
        thread.start()
        self.stop = weakref.finalize(self, _leave, self._state, self._board, thread)

    @contextlib.contextmanager
    def guard(self, what: str, step: bool = False) -> Iterator[None]:
        """Around what only all ranks together can do. step: it begins the next step.

        Raises RankError naming the rank at fault when another rank has died, failed or left. Reports this rank's own
        error to the others; errors that users can mend are not reported, because all ranks raise them alike.
        """
        state = self._state
        if state.failure:
            raise RankError(state.failure)
        state.steps += step
        outermost = state.inside is None
        state.inside = state.inside or time.monotonic()
        try:
            yield
        except OmniCompileError:
            raise
        except Exception as error:
            if not _is_broken_connection(error):
                self._report(f"rank {self._board.rank} failed in {self._where(what)}: {_line(error)}")
                raise
            state.inside = None  # this thread is at work again
            cause = self._cause(what, error)
            self._report(cause)
            raise RankError(cause) from error
        finally:
            if outermost:
                state.inside = None

    def _where(self, what: str) -> str:
        return f"{what} of step {self._state.steps}" if self._state.steps else what

    def _report(self, failure: str) -> None:
        self._state.learn(failure)
        with contextlib.suppress(Exception):  # the store may be gone with the rank that kept it
            self._board.report(failure)

    def _cause(self, what: str, error: Exception) -> str:
        """Why a collective has failed: a reported failure, a rank that has left, or one whose beats have stopped."""
        where = self._where(what)
        try:
            return self._observed(where) or f"{where} failed on rank {self._board.rank}, all ranks live: {_line(error)}"
        except Exception:
            return self._state.failure or f"{where} failed, and the store of the job is gone: rank 0 or torchrun ended"

    def _observed(self, where: str) -> str:
        board, started, first = self._board, time.monotonic(), self._board.beats()
        while True:
            if failure := board.read("failure"):
                return failure
            for rank in range(board.world):
                if rank != board.rank and (reason := board.read(f"left/{rank}")):
                    return f"rank {rank} {reason}, while rank {board.rank} was in {where}"
            passed, now = time.monotonic() - started, board.beats()
            moved = [_count(new) - _count(old) for old, new in zip(first, now)]
            healthy = all(count == 0 or count * self._patience.beat >= self._patience.settle / 2 for count in moved)
            if passed >= self._patience.settle and (healthy or passed >= 5 * self._patience.settle):
                return self._dead(now, moved, where)
            time.sleep(self._patience.beat / 4)

    def _dead(self, beats: list[tuple[str, ...]], moved: list[int], where: str) -> str:
        dead = [rank for rank, count in enumerate(moved) if count == 0 and rank != self._board.rank]
        if dead:
            texts = "; ".join(_described(rank, beats[rank]) for rank in dead)
            return f"{texts}, while rank {self._board.rank} was in {where}: see the end of its log, or a lack of memory"
        behind = [rank for rank, beat in enumerate(beats) if beat and int(beat[1]) < self._state.steps]
        if behind:
            steps = ", ".join(f"rank {rank} is in step {beats[rank][1]}" for rank in behind)
            return f"{where} was not joined by all ranks in time ({steps}): give every rank the same number of batches"
        return ""


def _described(rank: int, beat: tuple[str, ...]) -> str:
    if not beat:
        return f"rank {rank} did not come to parallelize"
    return f"rank {rank} died (process {beat[3]} on {beat[2]}, in step {beat[1]})"


def _count(beat: tuple[str, ...]) -> int:
    return int(beat[0]) if beat else 0


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _is_broken_connection(error: Exception) -> bool:
    """Backends raise RuntimeError for a peer that is gone or late, and say so in the text only."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in _BROKEN)
    )


def _own_connection(store: dist.Store) -> dist.Store:
    """A connection of the watch's own: the job's may be held by a thread that waits."""
    try:
        own = store.clone()
    except Exception:  # a store without connections
        return store
    own.set_timeout(timedelta(seconds=_STORE_SECONDS))
    return own


@dataclass
class _Neighbour:
    """The rank that this one looks after. beat: its last one, seen first at `since`."""

    board: _Board
    rank: int
    beat: str = ""
    since: float = field(default_factory=time.monotonic)

    def lost(self, waiting: float, silence: float) -> str:
        """What is wrong with it, if anything; waiting: seconds that this rank has been in a collective part."""
        beat, left = self.board.read(f"beat/{self.rank}"), self.board.read(f"left/{self.rank}")
        if beat != self.beat or not beat:
            self.beat, self.since = beat, time.monotonic()
        if left:
            return f"rank {self.rank} {left}, while rank {self.board.rank} waited for it" if waiting > silence else ""
        if time.monotonic() - self.since < silence:
            return ""
        _, step, host, process = self.beat.split()
        return (
            f"rank {self.rank} (process {process} on {host}) has given no sign of life for {silence:g} s in step {step}"
        )


def _attend(state: _State, board: _Board, patience: Patience) -> None:
    """The watching thread. It ends with `state.stop`, or when the store is gone."""
    neighbour, count = _Neighbour(board, (board.rank + 1) % board.world), 0
    while not state.stop.wait(patience.beat):
        count += 1
        try:
            board.beat(count, state.steps)
            inside = state.inside
            waiting = time.monotonic() - inside if inside is not None else 0.0
            if lost := neighbour.lost(waiting, patience.silence):
                board.report(lost)
            if failure := board.read("failure"):
                state.learn(failure)
        except Exception:
            if not state.stop.is_set():
                state.learn("the store of the job is gone: rank 0 or torchrun ended")
                _end_when_stuck(state, patience)
            return
        if _stuck(state, patience):
            _exit(state)


def _stuck(state: _State, patience: Patience) -> bool:
    inside = state.inside
    if inside is None or not state.failure:
        return False
    return time.monotonic() - max(inside, state.known) > patience.grace


def _end_when_stuck(state: _State, patience: Patience) -> None:
    while not state.stop.wait(patience.beat):
        if _stuck(state, patience):
            _exit(state)


def _exit(state: _State) -> None:
    print(f"omnicompile: {state.failure}", file=sys.stderr, flush=True)
    os._exit(1)


def _leave(state: _State, board: _Board, thread: threading.Thread) -> None:
    """At the end of the program: an interpreter must not end under a thread that is in the store."""
    state.stop.set()
    thread.join(_STORE_SECONDS)
    error = getattr(sys, "last_value", None)  # set by the interpreter when a program ends with an exception
    reason = "ended its program" if error is None else f"ended its program with {_line(error)}"
    with contextlib.suppress(Exception):
        board.store.set(f"left/{board.rank}", reason)
