"""Which of many failures is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from omnicompile.errors import InputError, RankError
from omnicompile.train.failures import RankFailure, cause_of, read_failures
from omnicompile.train.launch import Job


def failure(rank: int, error: Exception, moment: float) -> RankFailure:
    made = RankFailure.of(rank, error)
    return RankFailure(made.rank, made.code, made.told, made.follows, moment)


def test_failures_are_kept_in_a_folder(tmp_path: Path) -> None:
    made = [RankFailure.of(0, InputError("no such\nfile")), RankFailure.of(1, KeyError("x"))]
    for item in made:
        item.save(tmp_path)
    assert read_failures(tmp_path) == made
    assert [(item.code, item.told) for item in made] == [(2, "no such file"), (1, "KeyError: 'x'")]


def test_the_first_own_error_is_told_and_not_its_echoes() -> None:
    told = [failure(0, RankError("rank 1 died"), 3.0), failure(1, InputError("bad sample"), 2.0)]
    cause = cause_of(told, {0: (2, 10), 1: (2, 11)})
    assert (cause.code, cause.text) == (2, "rank 1: bad sample")


def test_what_all_ranks_say_is_told_once_without_a_rank() -> None:
    told = [failure(rank, InputError("no such file"), float(rank)) for rank in range(3)]
    cause = cause_of(told, {0: (2, 10)})
    assert (cause.code, cause.text) == (2, "no such file")


def test_a_killed_rank_is_told_before_the_echo_of_the_others() -> None:
    cause = cause_of([failure(0, RankError("rank 1 died"), 1.0)], {1: (-9, 4711)})
    assert cause.code == 1 and cause.text.startswith("rank 1 (process 4711) was killed by SIGKILL: the host may be out")
    assert "SIGSEGV" in cause_of([], {0: (-11, 3)}).text
    assert "rank 2 (process 5)" in cause_of([], {2: (-9, 5), 0: (-15, 3), 1: (-9, 4)}).text


def test_a_rank_without_a_word_and_a_job_that_a_signal_ended() -> None:
    assert "rank 2 with code 7" in cause_of([], {2: (7, 3)}).text
    stopped = [RankFailure(rank, 143, "", False, 1.0) for rank in range(2)]
    assert (cause_of(stopped, {0: (143, 3)}).code, cause_of(stopped, {0: (143, 3)}).text) == (143, "")
    # the launcher ends the slower rank on its way out; a rank that is killed is another matter
    assert cause_of(stopped[:1], {0: (143, 3), 1: (-15, 4)}).code == 143
    assert "killed by SIGKILL" in cause_of(stopped[:1], {0: (143, 3), 1: (-9, 4)}).text
    late = [*stopped, failure(1, InputError("the disk is full"), 2.0)]
    assert cause_of(late, {0: (143, 3)}).text == "rank 1: the disk is full"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"processes": 0}, "--nproc must be at least 1"),
        ({"processes": 1, "nodes": 2}, "needs --rdzv-endpoint"),
        ({"processes": 1, "nodes": 2, "endpoint": "node-0"}, "HOST:PORT"),
        ({"processes": 1, "nodes": 2, "node": 2, "endpoint": "node-0:1"}, "--node-rank must be from 0 to 1"),
    ],
)
def test_options_of_a_job(values: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Job(**values)  # type: ignore[arg-type]
