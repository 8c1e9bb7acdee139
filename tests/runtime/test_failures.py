"""Ranks that disagree, die, fail or leave end a job of real processes with the cause named, in bounded time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as dist

WORLD, SECONDS = 3, 240.0
SCRIPT = Path(__file__).parent / "failing_rank.py"
pytestmark = pytest.mark.slow


@dataclass
class Ended:
    """What a process left; code is None for one that had to be killed."""

    code: int | None
    out: str
    err: str

    @property
    def last(self) -> str:
        return self.err.strip().splitlines()[-1] if self.err.strip() else ""

    def told(self, what: str) -> str:
        return next((line for line in self.out.splitlines() if line.startswith(f"{what}: ")), "")


def run(case: str, folder: Path, wait_for: tuple[int, ...] = (0, 1, 2)) -> list[Ended]:
    """A job of three processes that rendezvous as under torchrun; ranks not in `wait_for` are killed at the end."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(WORLD), "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    started, files = [], []
    for rank in range(WORLD):
        files.append((folder / f"{rank}.out", folder / f"{rank}.err"))
        with files[-1][0].open("w") as out, files[-1][1].open("w") as err:
            environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(
                subprocess.Popen([sys.executable, str(SCRIPT), case], env=environment, stdout=out, stderr=err)
            )
    end = time.monotonic() + SECONDS
    try:
        while time.monotonic() < end and any(started[rank].poll() is None for rank in wait_for):
            time.sleep(0.2)
        codes = [process.poll() for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [Ended(code, out.read_text(), err.read_text()) for code, (out, err) in zip(codes, files)]


def test_a_killed_rank_is_named(tmp_path: Path) -> None:
    ended = run("killed", tmp_path)
    assert ended[1].code == -9
    for other in (ended[0], ended[2]):
        assert other.code == 1, other.err
        assert "RankError: rank 1 died (process" in other.last
        assert "while rank" in other.last  # where each was is as old as the last beat, on a busy machine some seconds


def test_a_rank_whose_program_fails_is_named_with_its_error(tmp_path: Path) -> None:
    ended = run("raises", tmp_path)
    for other in (ended[0], ended[2]):
        assert other.code == 1, other.err
        assert "rank 1 ended its program with ValueError: the data loader has no more samples" in other.last


def test_a_rank_that_fails_in_a_step_and_lives_on_ends_the_others(tmp_path: Path) -> None:
    ended = run("caught", tmp_path, wait_for=(0, 2))
    cause = "rank 1 failed in the forward of step 2: MemoryError: 12 GiB more are needed"
    for other in (ended[0], ended[2]):
        assert other.code == 1, other.err
        assert cause in other.last
    assert "MemoryError: 12 GiB" in ended[1].told("first")
    assert f"RankError: {cause}" in ended[1].told("again")


def test_a_rank_that_never_comes_to_parallelize_is_named(tmp_path: Path) -> None:
    ended = run("before", tmp_path)
    assert ended[1].code == 3
    for other in (ended[0], ended[2]):
        assert other.code == 1, other.err
        assert "rank 1 did not come to parallelize" in other.last


EXPECTED = {
    "plan": ("ranks disagree on the plan", "ranks 0, 2 have", "rank 1 has", "replicate", "same recipe"),
    "model": ("disagree on the model, and on the weights", "(128, 16)", "(128, 24)", "same model on every rank"),
    "weights": ("disagree on the weights", "'embedding.weight ", "rank 1 has", "set the same seed"),
    "example": ("disagree on the shapes of the example batch", "(1, 32)", "(1, 48)", "of the same budget"),
    "options": ("disagree on the options", "'segments 9'", "'segments 8'"),
    "versions": ("disagree on the versions", "rank 1 has 'torch 3", "same versions on every host"),
    "buffer": ("changes buffer seen in place", "compute a new tensor"),
    "rows": ("disagree on the shapes of the batch", "(1, 32)", "(2, 32)", "pad the batches of all ranks"),
    "dtype": ("disagree on the shapes of the batch", "torch.int64", "torch.int32"),
}


def test_ranks_that_disagree_are_named_with_the_field_and_can_go_on(tmp_path: Path) -> None:
    ended = run("differ", tmp_path)
    for rank, found in enumerate(ended):
        assert found.code == 0, found.err
        for what, words in EXPECTED.items():
            for word in words:
                assert word in found.told(what), (rank, what, found.told(what))
        assert found.told("trained")
        for what in ("long", "targets"):
            mine = "InputError: the batch is longer than the budget: 40 of 32"
            theirs = "LoweringError: rank 1 could not prepare its batch: the batch is longer than the budget"
            assert (mine if rank == 1 else theirs) in found.told(what)
        assert "rank 1" in found.told("keys") or "labels" in found.told("keys")
