"""`omnicompile train` as a user starts it: recipes for the tiny model of examples/train, its data, commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnicompile.cluster import Cluster
from omnicompile.plan import BlockPlan, Layout, Mesh, Plan, Sharding
from omnicompile.workload import Workload

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "train"
TOKENS, PATCHES = 192, 320


def plan(mesh: Mesh, accumulation: int = 1, sharding: Sharding = Sharding.FSDP) -> Plan:
    block = BlockPlan(sharding, Layout.SEQUENCE if mesh.sp > 1 else Layout.BATCH, mesh.sp)
    return Plan(
        model=str(EXAMPLE / "tiny_vl.py"), cluster=Cluster(gpus=mesh.world),
        workload=Workload(seq_len=TOKENS, images=2, image_size=(24, 24)), mesh=mesh,
        blocks={"vision": block, "text": block}, accumulation=accumulation, param_dtype="float32",
    )  # fmt: skip


def write_recipe(path: Path, mesh: Mesh, accumulation: int = 1, sharding: Sharding = Sharding.FSDP) -> Path:
    plan(mesh, accumulation, sharding).save(path)
    return path


def make_data(folder: Path, samples: int) -> Path:
    """A data file with a fixed budget, so that every recipe packs alike."""
    subprocess.run(
        [sys.executable, str(EXAMPLE / "make_data.py"), str(folder), "--samples", str(samples)],
        check=True, capture_output=True,
    )  # fmt: skip
    data = folder / "data.yaml"
    budget = f"{{tokens: {TOKENS}, patches: {PATCHES}, frames: 0, segments: 32}}"
    data.write_text(f"source: train.jsonl\nlook_ahead: 32\nbudget: {budget}\n")
    return data


def command(recipe: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "omnicompile", "train", str(recipe), "--device", "cpu", "--json", *options]


def environment(**more: str) -> dict[str, str]:
    """As a user's, without what a launcher of the tests themselves may have set."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    return clean | {"OMP_NUM_THREADS": "1"} | more


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines() if line.startswith("{")]

    @property
    def losses(self) -> dict[int, float]:
        return {event["step"]: event["loss"] for event in self.events if event["event"] == "step"}

    def named(self, event: str) -> list[dict[str, Any]]:
        return [found for found in self.events if found["event"] == event]


def run(recipe: Path, *options: str, seconds: float = 300) -> Ran:
    done = subprocess.run(
        command(recipe, *options), env=environment(), capture_output=True, text=True, timeout=seconds, check=False
    )
    return Ran(done.returncode, done.stdout, done.stderr)
