"""Attention runs in groups of heads: the result of one group is exchanged while the next computes."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from omnicompile.passes import collectives
from omnicompile.passes.propagate import module_of, schema_values
from omnicompile.passes.rank_program import RankProgram
from omnicompile.plan import Plan

_ATTENTION = torch.ops.omnicompile.attention.default
_HEADS = 1  # dimension of [batch, heads, tokens, head_dim]


def group_heads_pass(program: RankProgram, plan: Plan | None = None) -> RankProgram:
    """Cut attention that is followed by an all-to-all of its heads into `program.overlap.head_groups` groups.

    Before: `o = attention(q, k, v)[0]; y = all_to_all(o)`. After, with 2 groups of q's heads and the key and value
    heads that they read: `o0 = attention(q[:, :h], k[:, :n], v[:, :n])[0]; y0 = all_to_all(o0);
    o1 = attention(q[:, h:], k[:, n:], v[:, n:])[0]; y1 = all_to_all(o1); y = join(y0, y1)`, heads of
    a rank staying together.

    The schedule of exchanges launches each all-to-all behind its group, and in the backward, which autograd derives,
    those of the gradients likewise. The output projection waits for all groups, so its sums keep their order. Safe
    because heads do not see each other: results keep their bits, gradients of key heads that several groups read
    are summed in another order. Attention whose heads on a rank cannot be cut so is left whole, with a note. Runs after
    sequence parallelism.
    """
    groups = program.overlap.head_groups
    found = 0
    for node in list(program.gm.graph.nodes) if groups > 1 else ():
        if node.target is _ATTENTION and (exchange := _exchange_of(node)) is not None:
            ranges = _ranges(node, exchange, groups)
            if ranges is None:
                program.notes.append(f"attention in {module_of(node)} is not cut into {groups} groups of heads")
                continue
            _cut(program.gm.graph, node, exchange, ranges)
            found += 1
    program.gm.graph.eliminate_dead_code()
    program.gm.graph.lint()
    program.gm.recompile()
    program.log.append(f"{groups} groups of heads: {found} calls of attention")
    return program


def _exchange_of(attention: fx.Node) -> fx.Node | None:
    """The all-to-all that puts the heads of the result together and is all that reads it."""
    outputs = list(attention.users)
    if len(outputs) != 1 or outputs[0].target is not operator.getitem or outputs[0].args[1] != 0:
        return None
    readers = list(outputs[0].users)
    if len(readers) != 1 or readers[0].target is not collectives.all_to_all:
        return None
    _, _, _, join, join_outer, *_ = readers[0].args
    return readers[0] if (join, join_outer) == (_HEADS, 1) else None


Range = tuple[int, int]


def _ranges(attention: fx.Node, exchange: fx.Node, groups: int) -> list[tuple[Range, Range]] | None:
    """(first head, number) of the queries, and of the keys, of each group; None if heads do not divide."""
    values = schema_values(attention)
    ranks = exchange.args[5]
    assert isinstance(ranks, int)
    heads, keys = (_heads_of(values[name]) // ranks for name in ("q", "k"))
    size, repeated = heads // groups, heads // keys
    if heads % groups or (size % repeated and repeated % size):
        return None
    number = max(size // repeated, 1)
    return [((i * size, size), (i * size // repeated, number)) for i in range(groups)]


def _heads_of(node: fx.Node) -> int:
    """On all ranks together: shapes of a forward are those of whole tensors."""
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value.shape[_HEADS]


def _cut(graph: fx.Graph, attention: fx.Node, exchange: fx.Node, ranges: list[tuple[Range, Range]]) -> None:
    ranks = exchange.args[5]
    names = [argument.name for argument in _ATTENTION._schema.arguments]
    parts = []
    queries, keys = ([pair[i] for pair in ranges] for i in (0, 1))
    where = {"q": (_HEADS, queries), "k": (_HEADS, keys), "v": (_HEADS, keys), "sinks": (0, queries)}
    with graph.inserting_before(exchange):
        pieces = {
            name: _pieces(graph, value, *where[name])
            for name, value in zip(names, attention.args)
            if name in where and isinstance(value, fx.Node)
        }
        for i in range(len(ranges)):
            args = [pieces[name][i] if name in pieces else value for name, value in zip(names, attention.args)]
            part = _call(graph, _ATTENTION, tuple(args), attention)
            result = _call(graph, operator.getitem, (part, 0), exchange)
            parts.append(_call(graph, collectives.all_to_all, (result, *exchange.args[1:]), exchange))
        whole = _call(graph, collectives.join_heads, (ranks, *parts), exchange)
    whole.meta["val"] = exchange.meta["val"]
    exchange.replace_all_uses_with(whole)
    graph.erase_node(exchange)


def _pieces(graph: fx.Graph, value: fx.Node, dim: int, ranges: list[Range]) -> list[fx.Node]:
    """By group. What every head of goes to one group is split, so that its gradient is put together in one go."""
    starts, sizes = [start for start, _ in ranges], [size for _, size in ranges]
    if starts == [sum(sizes[:i]) for i in range(len(sizes))]:
        split = _call(graph, torch.ops.aten.split_with_sizes.default, (value, sizes, dim), value)
        return [_call(graph, operator.getitem, (split, i), value) for i in range(len(sizes))]
    return [_call(graph, torch.ops.aten.narrow.default, (value, dim, *where), value) for where in ranges]


def _call(graph: fx.Graph, target: object, args: tuple[object, ...], like: fx.Node) -> fx.Node:
    node = graph.call_function(target, args)  # type: ignore[arg-type]
    node.meta = {key: value for key, value in like.meta.items() if key != "val"}
    return node
