"""Killed while saving, a full disk, ranks that see different things: older checkpoints stay, and all ranks are told."""

from __future__ import annotations

import errno
import random
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

from checkpoint import forked
from checkpoint.forked import FORK, Children, ShardedModule, is_at, set_to, wait_for, whole_module
from omnicompile.checkpoint import checkpointer as implementation
from omnicompile.checkpoint.checkpointer import Checkpointer
from omnicompile.checkpoint.folder import CheckpointFolder
from omnicompile.errors import CheckpointError

ROWS = 6


@pytest.fixture
def folder() -> Iterator[Path]:
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as path:
        yield Path(path)


def check_last(run: Path, rows: int) -> int:
    """The step of the last whole checkpoint, after loading it and looking at every value."""
    module = whole_module(rows)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0)
    latest = Checkpointer(run).latest()
    assert latest is not None
    restored = Checkpointer(run).load(module, optimizer)
    assert restored.step == latest == restored.extra["step"]
    assert is_at(module, optimizer, latest)
    return latest


def test_killed_at_any_moment(folder: Path) -> None:
    """One process, 20 times, each going on after the last whole checkpoint."""
    run, moments, torn, last = folder / "run", random.Random(0), 0, 0
    for _ in range(20):
        process = FORK.Process(target=forked.save_for_ever, args=(whole_module(ROWS), run, last + 1), daemon=True)
        process.start()
        wait_for(lambda before=last: (Checkpointer(run).latest() or 0) > before)
        process.join(moments.uniform(0.0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        torn += len(list(run.glob(".saving-*")))
        reached = check_last(run, ROWS)
        assert reached > last
        last = reached
    print(f"{last} saved, {torn} torn")
    assert torn > 0
    assert len(list(run.glob("step-*"))) <= 3


def saving_ranks(rank: int, run: Path, first: int) -> None:
    forked.save_for_ever(ShardedModule(ROWS // 2), run, first)


@pytest.mark.slow
def test_a_rank_killed_at_any_moment(folder: Path) -> None:
    """Two processes, one of them killed; the other ends with an error, and a single process reads what they wrote."""
    run, moments, last = folder / "run", random.Random(1), 0
    for number in range(20):
        children = Children(2, folder / f"store{number}", saving_ranks, run, last + 1)
        wait_for(lambda before=last: (Checkpointer(run).latest() or 0) > before)
        victim = moments.randrange(2)
        children.processes[victim].join(moments.uniform(0.0, 0.1))
        children.processes[victim].kill()
        rank, message = children.result()
        assert rank == 1 - victim and ("Error" in message or "closed" in message), message
        children.end()
        reached = check_last(run, ROWS)
        assert reached > last
        last = reached


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    mounted = folder / "disk"
    mounted.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mounted)], capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a file system is not allowed here")
    yield mounted
    subprocess.run(["umount", str(mounted)], check=True)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk(small_disk: Path, asynchronous: bool) -> None:
    rows = 800  # three tensors of 64 columns, 614 KB a checkpoint
    module = whole_module(rows)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0)
    checkpointer = Checkpointer(small_disk / "run", asynchronous=asynchronous)
    set_to(module, optimizer, 1)
    checkpointer.save(1, module, optimizer, {"step": 1})
    set_to(module, optimizer, 2)
    with pytest.raises(CheckpointError, match=r"step 2 could not be saved to .*disk is full"):
        checkpointer.save(2, module, optimizer, {"step": 2})
        checkpointer.wait()
    assert check_last(small_disk / "run", rows) == 1
    assert not list((small_disk / "run").glob(".saving-*"))
    shutil.rmtree(small_disk / "run")
    set_to(module, optimizer, 3)
    checkpointer.save(3, module, optimizer, {"step": 3})  # with room again it goes on
    checkpointer.wait()
    assert check_last(small_disk / "run", rows) == 3


class FullWriter(FileSystemWriter):
    def write_data(self, plan: Any, planner: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")


def full_on_one_rank(rank: int, run: Path) -> str:
    module = ShardedModule(ROWS // 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0)
    checkpointer = Checkpointer(run)
    set_to(module, optimizer, 1)
    checkpointer.save(1, module, optimizer, {"step": 1})
    checkpointer.wait()
    if rank == 1:
        implementation.FileSystemWriter = FullWriter  # type: ignore[misc]
    try:
        checkpointer.save(2, module, optimizer, {"step": 2})
        checkpointer.wait()
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_a_disk_that_is_full_for_one_rank(folder: Path) -> None:
    messages = Children(2, folder / "store", full_on_one_rank, folder / "run").all()
    for message in messages:
        assert "step 2 could not be saved" in message and "rank 1" in message and "No space left" in message
    assert check_last(folder / "run", ROWS) == 1


class BlindFolder(CheckpointFolder):
    """Sees only what was written first, as a rank with an old view of the file system."""

    def scan(self) -> Any:
        whole, damaged = super().scan()
        return whole[:1], damaged


def different_views(rank: int, run: Path) -> list[Any]:
    module = ShardedModule(ROWS // 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0)
    checkpointer = Checkpointer(run)
    for step in (1, 2):
        set_to(module, optimizer, step)
        checkpointer.save(step, module, optimizer, {"step": step})
    checkpointer.wait()
    if rank == 1:
        checkpointer._folder = BlindFolder(run)
    found: list[Any] = [checkpointer.latest(), checkpointer.load(module, optimizer).step]
    found.append(is_at(module, optimizer, 2))
    try:
        checkpointer.save(3, module, optimizer, {"rank": rank})
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
    return found


def test_ranks_that_see_different_checkpoints_or_give_different_state(folder: Path) -> None:
    for found in Children(2, folder / "store", different_views, folder / "run").all():
        assert found[:3] == [2, 2, True]
        assert "InputError" in found[3] and "disagree" in found[3]
    assert not list((folder / "run").glob(".saving-*"))
