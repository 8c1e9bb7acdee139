"""Experts of a rank run in chunks: the rows of one travel while another computes."""

from __future__ import annotations

import operator

import torch
from torch import fx

from omnicompile.errors import LoweringError
from omnicompile.passes import expert_ops
from omnicompile.passes.propagate import module_of
from omnicompile.passes.rank_program import RankProgram
from omnicompile.plan import Plan

_ops = torch.ops.omnicompile
_OF_EXPERTS = {_ops.grouped_mm.default: 1, _ops.expert_bias.default: 0}
"""Operators with a tensor whose first dimension runs over experts, and which argument it is."""


def chunk_experts_pass(program: RankProgram, plan: Plan | None = None) -> RankProgram:
    """Cut the experts that a rank holds into `program.overlap.expert_chunks` chunks of neighbours.

    Before: `rows, order, counts, ... = dispatch(x, index, E, ep, group); y = grouped_mm(rows, w, counts); ...;
    o = combine(y, order, p, ..., group)`.
    After: `order, a, b = chunked_dispatch(x, index, E, ep, 2, group); w0, w1 = split(w); y0 = grouped_mm(a.rows, w0,
    a.counts); ...; r0 = as_arrived(y0, a.sorting); y1 = grouped_mm(b.rows, w1, b.counts); ...; r1 = as_arrived(y1,
    b.sorting); o = chunked_combine(order, p, group, (r0, ...), (r1, ...))`.

    - Rows are sorted by chunk, rank and expert, so that each chunk's are exchanged alone; numbers of rows are
      exchanged, and brought to the host, once for all chunks. Weights are cut in views, and a product has as many rows
      an expert as without chunks. The schedule of exchanges launches all dispatches at once and each combine behind
      its products.
    - A chunk's results go back into the order of their arrival right behind its products, so that in the backward too
      a chunk is not kept waiting by what arrives for the others.
    - Results come back into one tensor before they are weighted and summed, so no order of summation changes.

    Safe: what lies between works row by row, on rows that all belong to experts of one chunk. A layer in which
    something else reads these rows, or with experts that the chunks do not divide, is refused by name. Runs after
    expert parallelism and before parameters are sharded.
    """
    chunks = program.overlap.expert_chunks
    layers = 0
    for node in list(program.gm.graph.nodes):
        if chunks > 1 and node.target is expert_ops.dispatch:
            _Layer(program, node, chunks).rewrite()
            layers += 1
    program.gm.graph.eliminate_dead_code()
    program.gm.graph.lint()
    program.gm.recompile()
    program.log.append(f"experts in {chunks} chunks: {layers} layers")
    return program


class _Layer:
    """One layer of experts. outputs: what is taken of its dispatch, by number. body: between dispatch and combine."""

    def __init__(self, program: RankProgram, dispatch: fx.Node, chunks: int) -> None:
        self.graph, self.dispatch, self.chunks = program.gm.graph, dispatch, chunks
        experts, ranks = dispatch.args[2:4]
        assert isinstance(experts, int) and isinstance(ranks, int)
        if (experts // ranks) % chunks:
            raise LoweringError(
                f"{experts // ranks} experts of a rank in {module_of(dispatch)} cannot be cut into {chunks} chunks: "
                "choose a divisor for expert_chunks"
            )
        self.part = experts // ranks // chunks
        self.outputs = {user.args[1]: user for user in dispatch.users}
        combines = [user for user in self.outputs[1].users if user.target is expert_ops.combine]
        if len(combines) != 1:
            raise LoweringError(f"the experts in {module_of(dispatch)} are combined {len(combines)} times: no chunks")
        self.combine = combines[0]
        self.body = self._body()
        self.pieces: dict[fx.Node, list[fx.Node]] = {}

    def _body(self) -> list[fx.Node]:
        rows, counts = self.outputs[0], self.outputs.get(2)
        inside: set[fx.Node] = {rows}
        result = self.combine.args[0]
        for node in self.graph.nodes:
            if node is not self.combine and node not in inside and any(s in inside for s in node.all_input_nodes):
                inside.add(node)
        leaks = [n for n in inside if any(user not in inside and user is not self.combine for user in n.users)]
        leaks += [user for user in (counts.users if counts is not None else ()) if user not in inside]
        dead = [n for n in inside if not n.users]
        if leaks or dead or result not in inside:
            name = (leaks or dead or [self.dispatch])[0]
            raise LoweringError(
                f"rows of experts in {module_of(self.dispatch)} are read by {name.name} too: they cannot be chunked"
            )
        inside.discard(rows)
        return [node for node in self.graph.nodes if node in inside]

    def rewrite(self) -> None:
        x, index, experts, ranks, group = self.dispatch.args
        with self.graph.inserting_before(self.dispatch):
            new = self._call(expert_ops.chunked_dispatch, (x, index, experts, ranks, self.chunks, group), self.dispatch)
            order = self._item(new, 0, self.outputs[1])
            parts = [self._item(new, i + 1, self.dispatch) for i in range(self.chunks)]
        returned = []
        for number, part in enumerate(parts):
            with self.graph.inserting_before(self.combine):
                result, sorting = self._copy(number, part), self._item(part, 2, self.dispatch)
                arrived = self._call(expert_ops.as_arrived, (result, sorting), self.combine)
                rest = [self._item(part, i, self.dispatch) for i in (3, 4)]
            returned.append((arrived, *rest))
        with self.graph.inserting_before(self.combine):
            weight = self.combine.args[2]
            whole = self._call(expert_ops.chunked_combine, (order, weight, group, *returned), self.combine)
        self.combine.replace_all_uses_with(whole)
        self.graph.erase_node(self.combine)
        for node in reversed(self.body):
            self.graph.erase_node(node)

    def _copy(self, number: int, part: fx.Node) -> fx.Node:
        """The body once more, on the rows of one chunk."""
        made = {self.outputs[0]: self._item(part, 0, self.outputs[0])}
        if 2 in self.outputs:
            made[self.outputs[2]] = self._item(part, 1, self.outputs[2])
        for node in self.body:
            place = _OF_EXPERTS.get(node.target)  # type: ignore[call-overload]
            if place is not None:
                weight = node.args[place]
                assert isinstance(weight, fx.Node)
                made[weight] = self._piece(weight, node, number)
            made[node] = self.graph.node_copy(node, lambda n: made.get(n, n))
        result = self.combine.args[0]
        assert isinstance(result, fx.Node)
        return made[result]

    def _piece(self, weight: fx.Node, user: fx.Node, number: int) -> fx.Node:
        if weight not in self.pieces:
            pieces = self._call(torch.ops.aten.split.Tensor, (weight, self.part), user)
            self.pieces[weight] = [self._item(pieces, i, user) for i in range(self.chunks)]
        return self.pieces[weight][number]

    def _call(self, target: object, args: tuple[object, ...], like: fx.Node) -> fx.Node:
        node = self.graph.call_function(target, args)  # type: ignore[arg-type]
        node.meta = dict(like.meta)
        return node

    def _item(self, source: fx.Node, number: int, like: fx.Node) -> fx.Node:
        return self._call(operator.getitem, (source, number), like)
