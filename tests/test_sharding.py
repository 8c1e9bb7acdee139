"""The dimension along which a parameter is stored in pieces."""

from __future__ import annotations

import pytest
import torch

from omnicompile.passes.rank_program import ParamSpec, ShardSpec
from omnicompile.plan import Mesh
from omnicompile.sharding import shard_dim


@pytest.mark.parametrize(
    "shape, ranks, dim",
    [
        ((), 8, 0),
        ((4,), 8, 0),
        ((4, 64), 8, 0),  # a matrix
        ((128, 64, 32), 128, 0),
        ((128, 64, 32), 64, 0),
        ((128, 64, 32), 256, 0),  # padded alike
        ((128, 512, 32), 256, 1),
        ((160, 512, 32), 128, 1),  # 160 experts would be padded to 256
        ((3, 5, 7), 2, 1),
    ],
)
def test_the_dimension(shape: tuple[int, ...], ranks: int, dim: int) -> None:
    assert shard_dim(shape, ranks) == dim


def test_pieces_of_pieces_along_one_dimension() -> None:
    """Experts dealt out over ranks, and stored in pieces by those that hold the same ones."""
    mesh, full = Mesh(dp_shard=4, ep=2), torch.arange(32.0).view(8, 2, 2)
    spec = ParamSpec("w", (8, 2, 2), shards=(ShardSpec("ep", 0), ShardSpec("ep_rest", 0)))
    assert spec.local_shape(mesh) == (2, 2, 2)
    pieces = [spec.local_of(full, mesh, rank) for rank in range(4)]
    assert [int(piece[0, 0, 0]) // 4 for piece in pieces] == [0, 4, 2, 6]  # ranks 0 and 2 hold experts 0 to 3
