"""Expert parallelism: the experts of a layer are dealt out over `ep` consecutive ranks, and rows travel to them."""

from __future__ import annotations

import operator

import torch
from torch import fx

from omnicompile.errors import LoweringError
from omnicompile.passes import expert_ops
from omnicompile.passes.propagate import module_of
from omnicompile.passes.rank_program import RankProgram, ShardSpec, axis_size
from omnicompile.plan import Plan

AXIS = "ep"
_ops = torch.ops.omnicompile
# Where a weight goes through these, its expert dimension stays the first.
_TRANSPARENT = frozenset({"aten::to", "aten::_to_copy", "aten::contiguous", "aten::clone", "aten::alias"})


def insert_expert_parallel_pass(program: RankProgram, plan: Plan | None = None) -> RankProgram:
    """Send rows to the ranks that hold their experts.

    Before: `rows, order, counts = expert_dispatch(x, index, E); y = grouped_mm(rows, w, counts); o = expert_combine(y,
    order, p)`. After: `rows, order, counts, ... = dispatch(x, index, E, ep, group); y = grouped_mm(rows, w[mine],
    counts); o = combine(y, order, p, ...)`. What lies between works row by row and is left alone. Safe because an
    expert sees the rows of all ranks of its group, so its gradient is complete over the group, and rows return to the
    rank that they came from.
    """
    ranks = axis_size(program.mesh, AXIS)
    layers = 0
    for node in list(program.gm.graph.nodes):
        if ranks > 1 and node.target is _ops.expert_dispatch.default and program.block_of(node).ep > 1:
            _rewrite_layer(program, node, ranks)
            layers += 1
    program.gm.graph.eliminate_dead_code()
    program.gm.graph.lint()
    program.gm.recompile()
    program.log.append(f"expert parallel over {ranks} ranks: {layers} layers")
    return program


def _rewrite_layer(program: RankProgram, node: fx.Node, ranks: int) -> None:
    graph, group = program.gm.graph, program.group(AXIS)
    x, index, experts = node.args
    assert isinstance(experts, int)
    if experts % ranks:
        raise LoweringError(
            f"{experts} experts in {module_of(node)} cannot be dealt out over ep={ranks} ranks: choose a divisor"
        )
    with graph.inserting_before(node):
        new = graph.call_function(expert_ops.dispatch, (x, index, experts, ranks, group))
    new.meta = {**node.meta, "role": "expert_dispatch"}
    outputs = {user.args[1]: user for user in node.users}
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    order, rows, counts = outputs[1], outputs[0], outputs.get(2)
    for user in list(order.users):
        if user.target is _ops.expert_combine.default:
            _rewrite_combine(graph, user, new, group)
    for user in list(counts.users) if counts is not None else []:
        if user.target is _ops.grouped_mm.default:
            _deal_out(program, user.args[1], user)
        elif user.target is _ops.expert_bias.default:
            _deal_out(program, user.args[0], user)
            with graph.inserting_before(user):
                size = graph.call_function(expert_ops.row_count, (rows,))
            user.args = (user.args[0], user.args[1], size)


def _rewrite_combine(graph: fx.Graph, node: fx.Node, dispatch: fx.Node, group: str) -> None:
    with graph.inserting_before(node):
        extra = tuple(graph.call_function(operator.getitem, (dispatch, i)) for i in (3, 4, 5))
        new = graph.call_function(expert_ops.combine, (*node.args, *extra, group))
    new.meta = {**node.meta, "role": "expert_combine"}
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _deal_out(program: RankProgram, weight: object, user: fx.Node) -> None:
    """Shard the parameter behind `weight` along its first dimension."""
    node = weight
    while isinstance(node, fx.Node) and node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        if node.target._schema.name not in _TRANSPARENT:
            break
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.name not in program.params:
        raise LoweringError(
            f"the expert weights in {module_of(user)} are computed, not a parameter: they cannot be dealt out over ep"
        )
    spec = program.params[node.name]
    shard = ShardSpec(AXIS, 0)
    if shard not in spec.shards:
        program.params[node.name] = type(spec)(spec.name, spec.shape, spec.trainable, spec.dtype, (shard,), ())
