"""A run that goes on under another plan, or on another number of processes, has the losses of the uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import run_ranks

from checkpoint.resuming import SAVED, Layout, only_run, saved_and_resumed
from omnicompile.plan import Mesh, Sharding

FSDP2, FSDP4 = Layout(Mesh(dp_shard=2)), Layout(Mesh(dp_shard=4))
SP2 = Layout(Mesh(sp=2))
TWO = Layout(Mesh(dp_shard=2), Sharding.REPLICATE)
HSDP2, HSDP_SP = Layout(Mesh(dp_replicate=2), Sharding.HSDP), Layout(Mesh(dp_replicate=2, sp=2), Sharding.HSDP)
EP2, EP_SP = Layout(Mesh(dp_shard=2, ep=2)), Layout(Mesh(dp_shard=2, sp=2, ep=2))
TOLERANCE = 1e-5

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SAME_WORLD = [
    ("uneven", "adamw", FSDP2, SP2),
    ("uneven", "fused", TWO, FSDP2),
    ("uneven", "sgd", HSDP2, FSDP2),
    ("experts", "adamw", EP2, FSDP2),
]
OTHER_WORLD = [
    ("uneven", "adamw", FSDP4, FSDP2),
    ("uneven", "adamw", HSDP_SP, FSDP2),
    ("experts", "fused", FSDP4, EP2),
    ("experts", "adamw", EP_SP, SP2),
]


def test_another_plan_on_as_many_processes(tmp_path: Path) -> None:
    for found in run_ranks(saved_and_resumed, 2, SAME_WORLD, str(tmp_path)):
        for number, (want, got) in found.items():
            assert got == pytest.approx(want, abs=TOLERANCE), SAME_WORLD[int(number)]


def test_four_processes_then_two(tmp_path: Path) -> None:
    before = run_ranks(only_run, 4, OTHER_WORLD, str(tmp_path), False)
    after = run_ranks(only_run, 2, OTHER_WORLD, str(tmp_path), True)
    for case, want, got in zip(OTHER_WORLD, before[0], after[0]):
        print(case[0], max(abs(a - b) for a, b in zip(want[SAVED:], got)))
        assert got == pytest.approx(want[SAVED:], abs=TOLERANCE), case


def test_two_processes_then_four_with_dropout(tmp_path: Path) -> None:
    cases = [("dropping", "adamw", Layout(Mesh(sp=2)), Layout(Mesh(sp=4))), ("experts", "adamw", EP2, EP_SP)]
    before = run_ranks(only_run, 2, cases, str(tmp_path), False)
    after = run_ranks(only_run, 4, cases, str(tmp_path), True)
    for case, want, got in zip(cases, before[0], after[0]):
        assert got == pytest.approx(want[SAVED:], abs=TOLERANCE), case
