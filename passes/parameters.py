"""Sharded parameters: stored in pieces, gathered before use, gradients scattered back."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from omnicompile.errors import LoweringError
from omnicompile.passes import collectives
from omnicompile.passes.rank_program import DATA_AXES, ParamSpec, RankProgram, ShardSpec, axis_size
from omnicompile.plan import Plan, Sharding
from omnicompile.sharding import shard_dim

_WITHIN = "dp_shard,sp"
_EXPERT_REST = {Sharding.FSDP: "dp_replicate,ep_rest", Sharding.HSDP: "ep_rest"}
_REST = {Sharding.FSDP: DATA_AXES, Sharding.HSDP: _WITHIN}


def shard_parameters_pass(program: RankProgram, plan: Plan | None = None) -> RankProgram:
    """FSDP and HSDP.

    Before: `y = linear(x, w)`. After: `y = linear(x, gather_param(w_shard))`, the gather's backward being a
    reduce-scatter over the same ranks: every rank's gradient of the whole parameter is Partial over all data ranks, as
    every rank sees its own tokens. HSDP shards over dp_shard x sp and leaves the sum over dp_replicate to the runtime
    (`reduce_axes`), to be done on the last micro-step. Whole parameters leave the sum over all data ranks to it. A
    rank's own experts are stored in pieces like anything else, along the dimension that `shard_dim` says. A tied
    parameter is stored once and gathered for each use. Frozen parameters are gathered alike; no gradient flows.
    """
    gathers = 0
    for node in list(program.gm.graph.find_nodes(op="placeholder")):
        if node.name in program.params:
            gathers += _shard(program, node)
    program.gm.graph.lint()
    program.gm.recompile()
    program.log.append(f"parameters: {gathers} gathers of {len(program.params)} parameters")
    return program


def _sharding(program: RankProgram, node: fx.Node) -> Sharding:
    found = {program.block_of(user).sharding for user in node.users} or {program.main_block().sharding}
    if len(found) > 1:
        name = program.params[node.name].name
        blocks = {str(user.meta.get("block")): program.block_of(user).sharding for user in node.users}
        texts = ", ".join(f"{block}: {sharding}" for block, sharding in sorted(blocks.items()))
        raise LoweringError(
            f"parameter {name} is shared by blocks with different sharding ({texts}): give them the same sharding"
        )
    return found.pop()


def _shard(program: RankProgram, node: fx.Node) -> int:
    spec = program.params[node.name]
    sharding = _sharding(program, node)
    planned = _planned(spec, sharding, program)
    program.params[node.name] = planned
    gathered = planned.shards[len(spec.shards) :]
    dtype = program.param_dtype if program.param_dtype is not None and spec.dtype.is_floating_point else spec.dtype
    users = list(node.users)
    for user in users:
        if gathered:
            _gather(program, node, user, gathered[0], dtype)
        elif dtype != spec.dtype:
            _cast(program, node, user, dtype)
    return len(users) if gathered else 0


def _planned(spec: ParamSpec, sharding: Sharding, program: RankProgram) -> ParamSpec:
    """Where the parameter is stored in pieces and what is left to reduce."""
    expert = bool(spec.shards)
    everyone = "dp_replicate,ep_rest" if expert else DATA_AXES
    axes = (_EXPERT_REST if expert else _REST).get(sharding)
    if axes is None or not spec.shape:
        return replace(spec, reduce_axes=_nontrivial(program, everyone))
    ranks = axis_size(program.mesh, axes)
    piece = ShardSpec(axes, shard_dim(spec.local_shape(program.mesh), ranks))
    shards = spec.shards if ranks == 1 else (*spec.shards, piece)
    left = _nontrivial(program, "dp_replicate") if sharding is Sharding.HSDP else ()
    return replace(spec, shards=shards, reduce_axes=left)


def _nontrivial(program: RankProgram, axes: str) -> tuple[str, ...]:
    if axis_size(program.mesh, axes) == 1:
        return ()
    program.group(axes)
    return (axes,)


def _gather(program: RankProgram, node: fx.Node, user: fx.Node, shard: ShardSpec, dtype: torch.dtype) -> None:
    graph, spec = program.gm.graph, program.params[node.name]
    ranks = axis_size(program.mesh, shard.axes)
    size = replace(spec, shards=spec.shards[:-1]).local_shape(program.mesh)[shard.dim]
    args = (node, shard.dim, size, dtype, program.reduce_dtype, ranks, program.group(shard.axes))
    with graph.inserting_before(user):
        whole = graph.call_function(collectives.gather_param, args)
    whole.meta = {**node.meta, "role": "param_gather", "param": node.name, "block": user.meta.get("block")}
    whole.meta["nn_module_stack"] = user.meta.get("nn_module_stack")
    user.replace_input_with(node, whole)


def _cast(program: RankProgram, node: fx.Node, user: fx.Node, dtype: torch.dtype) -> None:
    graph = program.gm.graph
    with graph.inserting_before(user):
        cast = graph.call_function(torch.ops.aten.to.dtype, (node, dtype))
    cast.meta = dict(node.meta)
    user.replace_input_with(node, cast)
