"""A rank's parameter store without processes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from omnicompile.passes.rank_program import ParamSpec, ShardSpec, axis_size
from omnicompile.plan import Mesh
from omnicompile.runtime.mesh import RuntimeMesh
from omnicompile.runtime.parameters import ParameterStore
from omnicompile.sharding import shard_dim

EVERYONE = "dp_replicate,dp_shard,sp"


class NoWatch:
    """Of a single process over nobody."""


def specs_of(model: nn.Module, mesh: Mesh) -> dict[str, ParamSpec]:
    """As the passes shard it: experts over ep and its rest along `shard_dim`, all else along dim 0. Every third one is
    replicated."""
    specs = {}
    for number, (name, value) in enumerate(model.named_parameters()):
        shards = (ShardSpec(EVERYONE, 0),)
        if mesh.ep > 1 and "experts" in name:
            own = (value.shape[0] // mesh.ep, *value.shape[1:])
            shards = (ShardSpec("ep", 0), ShardSpec("ep_rest", shard_dim(own, axis_size(mesh, "ep_rest"))))
        elif number % 3 == 2:
            shards = ()
        specs[name] = ParamSpec(name, tuple(value.shape), True, torch.float32, shards)
    return specs


def store_of(mesh: Mesh, rank: int, specs: Mapping[str, ParamSpec]) -> ParameterStore:
    return ParameterStore(RuntimeMesh(mesh, rank, torch.device("cpu"), None, NoWatch()), specs)  # type: ignore[arg-type]
