"""Ranks killed at random moments, and runs that go on, on other numbers of processes and under other plans too."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import runs

from omnicompile.checkpoint.folder import CheckpointFolder
from omnicompile.plan import Mesh, Sharding

STEPS, PACKS, KILLS, SECONDS = 80, 4, 20, 240.0
RECIPES = {
    "fsdp-2": (Mesh(dp_shard=2), PACKS // 2, Sharding.FSDP),
    "fsdp-4": (Mesh(dp_shard=4), PACKS // 4, Sharding.FSDP),
    "hsdp-sp-4": (Mesh(dp_replicate=2, sp=2), PACKS // 2, Sharding.HSDP),
}
# Every second run goes on under another recipe than the one before it.
ORDER = ("fsdp-2", "fsdp-2", "fsdp-4", "fsdp-4", "fsdp-2", "fsdp-2", "hsdp-sp-4", "hsdp-sp-4")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@dataclass
class Job:
    """A run under way. events: what it has told so far, filled by a thread."""

    process: subprocess.Popen[str]
    events: list[dict[str, Any]] = field(default_factory=list)
    reader: threading.Thread | None = None

    @staticmethod
    def start(recipe: Path, errors: Path, *options: str) -> Job:
        with errors.open("w") as file:
            process = subprocess.Popen(
                runs.command(recipe, *options), env=runs.environment(), stdout=subprocess.PIPE, stderr=file, text=True
            )
        job = Job(process)
        job.reader = threading.Thread(target=job._read, daemon=True)
        job.reader.start()
        return job

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                self.events.append(json.loads(line))

    def count(self, event: str) -> int:
        return sum(found["event"] == event for found in self.events)

    def wait_for(self, holds: Callable[[], bool]) -> bool:
        """False if the run has ended before."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            if holds():
                return True
            if self.process.poll() is not None:
                return holds()
            time.sleep(0.005)
        raise AssertionError(f"the run stands still after {self.events[-3:]}")

    def ranks(self, world: int) -> list[psutil.Process]:
        """The processes of the ranks, by rank: the launcher starts them in that order."""
        found = psutil.Process(self.process.pid).children()
        ranks = [child for child in found if "omnicompile" in " ".join(child.cmdline())]
        return sorted(ranks, key=lambda child: (child.create_time(), child.pid))[:world]

    def end(self) -> int:
        code = self.process.wait(SECONDS)
        assert self.reader is not None
        self.reader.join(SECONDS)
        return code


def kill_at_random(job: Job, world: int, draw: random.Random) -> int | None:
    """Kill -9 one rank: while the run starts, between steps, or while a checkpoint is written. None if it has ended."""
    when, rank = draw.choice(("start", "step", "step", "checkpoint", "checkpoint")), draw.randrange(world)
    if when == "start":
        alive = job.wait_for(lambda: len(job.ranks(world)) == world)
        time.sleep(draw.uniform(0, 12))
    elif when == "step":
        steps = draw.randint(1, 5)
        alive = job.wait_for(lambda: job.count("step") >= steps)
        time.sleep(draw.uniform(0, 0.5))
    else:
        saves = draw.randint(1, 2)
        alive = job.wait_for(lambda: job.count("checkpoint") >= saves)
        time.sleep(draw.uniform(0, 0.05))
    ranks = job.ranks(world) if alive and job.process.poll() is None else []
    if len(ranks) < world:
        return None
    os.kill(ranks[rank].pid, signal.SIGKILL)
    return ranks[rank].pid


def losses_of(events: list[dict[str, Any]]) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in events if event["event"] == "step"}


def sample_lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("faults")
    runs.make_data(found / "data", 300)
    runs.write_recipe(found / "one.yaml", Mesh(), PACKS)
    for name, (mesh, accumulation, sharding) in RECIPES.items():
        runs.write_recipe(found / f"{name}.yaml", mesh, accumulation, sharding)
    return found


@pytest.fixture(scope="module")
def options(folder: Path) -> tuple[str, ...]:
    text = f"checkpoint_every=2|log_samples=true|optimizer.lr=3e-3|steps={STEPS}|schedule.kind=cosine"
    return ("--data", str(folder / "data" / "data.yaml"), *(o for item in text.split("|") for o in ("--set", item)))


@pytest.fixture(scope="module")
def whole(folder: Path, options: tuple[str, ...]) -> tuple[dict[int, float], list[dict[str, Any]]]:
    """Losses and samples of a run of one process that nobody disturbs."""
    done = runs.run(folder / "one.yaml", *options, "--out", str(folder / "whole"), seconds=900)
    assert done.code == 0, done.err
    return done.losses, sample_lines(folder / "whole")


def test_killed_runs_go_on_without_losing_or_repeating_a_sample(
    folder: Path, options: tuple[str, ...], whole: tuple[dict[int, float], list[dict[str, Any]]]
) -> None:
    draw, out, errors = random.Random(0), folder / "killed", folder / "errors.txt"
    checkpoints, kills, told, names = CheckpointFolder(out / "checkpoints"), 0, [], []
    while kills < KILLS:
        name = ORDER[kills % len(ORDER)]
        before, damaged = checkpoints.scan()
        assert not damaged, "a checkpoint that was torn is taken for one"
        job = Job.start(folder / f"{name}.yaml", errors, *options, "--out", str(out))
        pid = kill_at_random(job, RECIPES[name][0].world, draw)
        code = job.end()
        check_events(job.events, before[-1].manifest.step if before else 0, whole[0])
        assert pid is not None, f"the run has come to its end after {kills} kills: raise STEPS\n{errors.read_text()}"
        kills += 1
        names.append(name)
        assert code == 1, (code, errors.read_text())
        told.append(errors.read_text().strip())
        assert told[-1].count("\n") == 0 and f"(process {pid}) was killed by SIGKILL" in told[-1], told[-1]
    assert sum(a != b for a, b in pairwise(names)) >= KILLS // 2 - 1
    before, _ = checkpoints.scan()
    last = Job.start(folder / "fsdp-2.yaml", errors, *options, "--out", str(out))
    assert last.end() == 0, errors.read_text()
    check_events(last.events, before[-1].manifest.step if before else 0, whole[0])
    assert sample_lines(out) == whole[1]
    keys = [tuple(key) for line in sample_lines(out) for key in line["samples"]]
    assert len(set(keys)) == len(keys)
    whole_ones, damaged = checkpoints.scan()
    assert whole_ones[-1].manifest.step == STEPS and not damaged


def check_events(events: list[dict[str, Any]], saved: int, want: dict[int, float]) -> None:
    """A run goes on from the last whole checkpoint, with the losses of the run that nobody disturbed."""
    resumed = [event["step"] for event in events if event["event"] == "resumed"]
    losses = losses_of(events)
    if losses or resumed:
        assert resumed == ([saved] if saved else [])
        assert list(losses) == list(range(saved + 1, saved + 1 + len(losses)))
    for step, loss in losses.items():
        assert loss == pytest.approx(want[step], abs=1e-4), (step, saved)


@pytest.mark.parametrize("whom", ["launcher", "rank"])
def test_a_signal_saves_and_ends_the_job_with_its_own_code(folder: Path, options: tuple[str, ...], whom: str) -> None:
    out = folder / f"stopped-{whom}"
    job = Job.start(folder / "fsdp-2.yaml", folder / "stop.txt", *options, "--out", str(out))
    assert job.wait_for(lambda: job.count("step") >= 3)
    (job.process if whom == "launcher" else job.ranks(2)[1]).send_signal(signal.SIGTERM)
    assert job.end() == 128 + signal.SIGTERM
    assert (folder / "stop.txt").read_text() == ""
    assert [event["event"] for event in job.events][-2:] == ["checkpoint", "stopped"]
    saved, _ = CheckpointFolder(out / "checkpoints").scan()
    assert saved[-1].manifest.step == job.events[-1]["step"] == job.events[-3]["step"]
