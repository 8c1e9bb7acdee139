"""The watch over other ranks: three watches on one store stand for three processes."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from omnicompile.errors import InputError, RankError
from omnicompile.runtime.watch import Patience, Watch

PATIENCE = Patience(beat=0.05, silence=1.5, settle=0.3, grace=60.0)
BROKEN = "[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"


@pytest.fixture
def watches() -> Iterator[list[Watch]]:
    store = dist.HashStore()
    made = [Watch(store, rank, 3, PATIENCE) for rank in range(3)]
    yield made
    for watch in made:
        watch.stop()


def wait_for_failure(watch: Watch, seconds: float = 30.0) -> str:
    """What `watch` raises at the next step, once it knows."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with watch.guard("the forward"):
                time.sleep(0.02)
        except RankError as error:
            return str(error)
    raise AssertionError("nothing was reported")


def fail(watch: Watch, error: Exception, what: str = "the forward", step: bool = True) -> None:
    with watch.guard(what, step):
        raise error


def kill(watch: Watch) -> None:
    """As SIGKILL does: no beat any more, and no word of leaving."""
    watch._state.stop.set()
    watch.stop.detach()


def test_an_error_of_one_rank_reaches_the_others(watches: list[Watch]) -> None:
    with pytest.raises(MemoryError):
        fail(watches[1], MemoryError("12 GiB"))
    told = wait_for_failure(watches[0])
    assert told == "rank 1 failed in the forward of step 1: MemoryError: 12 GiB"
    assert wait_for_failure(watches[2]) == told


def test_an_error_that_all_ranks_raise_alike_is_not_reported(watches: list[Watch]) -> None:
    with pytest.raises(InputError):
        fail(watches[1], InputError("the batch is longer than the budget"))
    time.sleep(4 * PATIENCE.beat)
    with watches[0].guard("the forward"):
        pass


def test_a_broken_connection_names_the_rank_whose_beats_stopped(watches: list[Watch]) -> None:
    kill(watches[2])
    with pytest.raises(
        RankError, match=r"rank 2 died \(process \d+ on .*, in step 0\), while rank 0 was in the forward"
    ):
        fail(watches[0], RuntimeError(BROKEN))
    assert "rank 2 died" in wait_for_failure(watches[1])


def test_a_broken_connection_names_the_rank_that_left(watches: list[Watch]) -> None:
    watches[1].stop()
    with pytest.raises(RankError, match="rank 1 ended its program, while rank 0 was in the backward of step 1"):
        with watches[0].guard("the forward", step=True):
            pass
        fail(watches[0], RuntimeError(BROKEN), "the backward", step=False)


def test_a_broken_connection_names_the_failure_that_a_rank_reported(watches: list[Watch]) -> None:
    with pytest.raises(ValueError):
        fail(watches[1], ValueError("not a number"))
    with pytest.raises(RankError, match="rank 1 failed in the forward of step 1: ValueError: not a number"):
        fail(watches[2], RuntimeError(BROKEN))


def test_a_timeout_names_the_ranks_that_did_not_come(watches: list[Watch]) -> None:
    for watch in (watches[0], watches[2]):
        with watch.guard("the forward", step=True):
            pass
    late = "[../gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation to complete"
    with pytest.raises(RankError, match=r"step 2 was not joined by all ranks .*rank 1 is in step 0.*number of batches"):
        fail(watches[0], RuntimeError(late))


def test_a_rank_that_stands_still_is_reported_by_the_one_before_it(watches: list[Watch]) -> None:
    kill(watches[1])
    assert "rank 1 (process" in wait_for_failure(watches[2])
    assert "has given no sign of life for 1.5 s" in wait_for_failure(watches[0])


def test_a_rank_that_ends_while_no_other_waits_is_nobody_s_failure(watches: list[Watch]) -> None:
    watches[2].stop()
    time.sleep(PATIENCE.silence + 10 * PATIENCE.beat)
    with watches[1].guard("the forward"):
        pass
