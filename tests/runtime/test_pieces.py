"""Experts dealt out over ranks, and stored in pieces by those that hold the same ones: state on four processes."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from tiny_models import run_ranks

from omnicompile.passes.rank_program import ParamSpec, ShardSpec
from omnicompile.plan import Mesh
from omnicompile.runtime.mesh import build_mesh
from omnicompile.runtime.parameters import ParameterStore

MESH = Mesh(dp_shard=4, ep=2)
SIZES = (2, 6, 8, 10)  # experts; not always as many for each rank


def stored(sizes: tuple[int, ...], dim: int) -> ParameterStore:
    shards = (ShardSpec("ep", 0), ShardSpec("ep_rest", dim))
    specs = {f"w{size}": ParamSpec(f"w{size}", (size, 5, 2), shards=shards) for size in sizes}
    return ParameterStore(build_mesh(MESH, "cpu"), specs)


def whole(size: int) -> torch.Tensor:
    return torch.arange(size * 10.0).view(size, 5, 2)


def fill(store: ParameterStore, name: str, value: torch.Tensor) -> None:
    part = store.part_of(name)
    store.take(name, value[part], tuple(slice(0, item.stop - item.start) for item in part))


def state(rank: int, world: int, folder: str) -> list[bool]:
    """Whether state dicts hold the whole parameters, and whether another way of storing them reads a checkpoint."""
    found: list[bool] = []
    for dim in (0, 1):
        store, other = stored(SIZES, dim), stored(SIZES, 1 - dim)
        for size in SIZES:
            fill(store, f"w{size}", whole(size))
            fill(other, f"w{size}", torch.zeros(size, 5, 2))
        saved, read = store.state_dict(), other.state_dict()
        found += [torch.equal(saved[f"w{size}"].full_tensor(), whole(size)) for size in SIZES]  # type: ignore[attr-defined]
        dcp.save(saved, checkpoint_id=f"{folder}/{dim}")
        dcp.load(read, checkpoint_id=f"{folder}/{dim}")
        found += [torch.equal(read[f"w{size}"].full_tensor(), whole(size)) for size in SIZES]  # type: ignore[attr-defined]
    return found


def test_state_of_pieces_of_pieces(tmp_path: Path) -> None:
    for found in run_ranks(state, 4, str(tmp_path)):
        assert found == [True] * 4 * len(SIZES)
