"""Shifts targets instead of logits, so that logits stay cut along the sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from omnicompile.passes.propagate import operator_name, schema_values
from omnicompile.passes.rank_program import RankProgram
from omnicompile.passes.rules.base import node_shape
from omnicompile.plan import Plan

aten = torch.ops.aten
_RESHAPES = frozenset({"aten::view", "aten::reshape", "aten::flatten", "aten::_unsafe_view"})
_COPIES = frozenset({"aten::contiguous", "aten::clone", "aten::alias", "aten::detach"})
_CASTS = frozenset({"aten::to", "aten::_to_copy", "aten::float"})


def align_targets_pass(program: RankProgram, plan: Plan | None = None) -> RankProgram:
    """Predict the next token from all positions, the last of which has no target.

    Before: `l = cross_entropy(flatten(logits[:, :-1]), t)` with t [batch * (s - 1)]. After: `l =
    cross_entropy(flatten(logits), flatten(pad(view(t, [batch, s - 1]), [0, 1], ignore_index)))`. An ignored target
    counts neither in the sum nor in the number of targets. s - 1 positions divide by no number of ranks and would be
    gathered; s positions stay cut.
    """
    aligned = 0
    for node in list(program.gm.graph.nodes):
        if node.op == "call_function" and node.target is aten.cross_entropy_loss.default:
            found = _find(node)
            if found is not None:
                _rewrite(program.gm.graph, node, found)
                aligned += 1
    if aligned:
        program.gm.graph.eliminate_dead_code()
        program.gm.graph.lint()
        program.gm.recompile()
        program.log.append(f"targets: {aligned} losses read whole logits")
    return program


@dataclass(frozen=True)
class _Shifted:
    """logits [batch, s, classes] of which the last position is dropped; dtype: that the loss reads."""

    logits: fx.Node
    dtype: torch.dtype


def _find(loss: fx.Node) -> _Shifted | None:
    values = schema_values(loss)
    node = values["self"]
    if values["reduction"] == 0 or values["weight"] is not None or len(node_shape(node)) != 2:
        return None
    dtype = node.meta["val"].dtype
    while isinstance(node, fx.Node) and node.op == "call_function":
        name = operator_name(node)
        if name == "aten::slice" and _drops_last(node):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            return _Shifted(source, dtype)
        if name not in _RESHAPES | _COPIES | _CASTS and not _is_whole_slice(node):
            return None
        if node_shape(node)[-1] != node_shape(loss.args[0])[-1]:  # type: ignore[arg-type]
            return None
        node = node.args[0]
    return None


def _is_whole_slice(node: fx.Node) -> bool:
    return operator_name(node) == "aten::slice" and node_shape(node) == node_shape(node.args[0])  # type: ignore[arg-type]


def _drops_last(node: fx.Node) -> bool:
    values = schema_values(node)
    shape = node_shape(values["self"])
    return (
        len(shape) == 3
        and values["dim"] in (1, -2)
        and values["start"] in (None, 0)
        and values["step"] == 1
        and node_shape(node)[1] == shape[1] - 1
    )


def _rewrite(graph: fx.Graph, loss: fx.Node, found: _Shifted) -> None:
    values = schema_values(loss)
    batch, length, classes = node_shape(found.logits)
    target = values["target"]
    ignored = values["ignore_index"]

    def emit(function: object, args: tuple[object, ...]) -> fx.Node:
        new = graph.call_function(function, args)  # type: ignore[arg-type]
        new.meta = dict(loss.meta)
        new.meta["val"] = function(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in args))  # type: ignore[operator]
        return new

    with graph.inserting_before(loss):
        logits = found.logits
        if logits.meta["val"].dtype != found.dtype:
            logits = emit(aten.to.dtype, (logits, found.dtype))
        flat = emit(aten.reshape.default, (logits, [batch * length, classes]))
        rows = emit(aten.reshape.default, (target, [batch, length - 1]))
        padded = emit(aten.constant_pad_nd.default, (rows, [0, 1], ignored))
        targets = emit(aten.reshape.default, (padded, [batch * length]))
    loss.args = (flat, targets, *loss.args[2:])
