"""Decides where every tensor lies over the `sp` ranks, and puts in the redistributions that this takes.

Inputs are whole on every rank (Replicate), and cutting a whole tensor is free. So a whole tensor may carry a *virtual*
cut: the one it would have if the inputs had been cut along their tokens. Integer metadata stays whole and only passes
the virtual cut on; the first floating-point tensor made from it (a token embedding, patches) is cut for real, in
blocks whose layout asks for it. Every operator then takes, of the choices its rule lists, the one with the least
communication.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from omnicompile.errors import LoweringError
from omnicompile.passes import collectives
from omnicompile.passes.placement import PARTIAL, REPLICATE, Placement, Replicate, Shard, divides
from omnicompile.passes.rank_program import InputSpec, RankProgram, axis_size
from omnicompile.passes.redistribute import Redistributor, cost
from omnicompile.passes.rules import RULES
from omnicompile.passes.rules.base import RANK, Choice, OpCall, Rule, node_shape
from omnicompile.passes.rules.pointwise import is_tagged_pointwise, pointwise
from omnicompile.plan import Layout, Plan

AXIS = "sp"
Placements = tuple[Placement, ...]

_LINEAR_HELPERS = frozenset({collectives.share, collectives.all_reduce})

# How much a choice goes against virtual cuts; smaller than any communication, larger than nothing.
_LOSES_CUT, _MOVES_CUT, _CUTS_PLAIN = 2.0, 4.0, 0.1


def insert_sequence_parallel_pass(program: RankProgram, plan: Plan | None = None) -> RankProgram:
    """Cut activations over the `sp` ranks as each block's layout says.

    Before: `e = embedding(w, ids); q = linear(e, wq).view(..); o = attention(q, k, v); l = cross_entropy(.., labels)`.
    After: `e = embedding(w, slice(ids)); q = ..; o = all_to_all(attention(all_to_all(q), ..)); l = cross_entropy(..,
    slice(labels))` with l Partial. Safe because each choice of each rule is exact, and each redistribution's backward
    follows the gradient convention.
    """
    ranks = axis_size(program.mesh, AXIS)
    if ranks == 1:
        program.outputs = (PARTIAL,) + (REPLICATE,) * (len(program.output_nodes()) - 1)
        return program
    walk = Propagation(program, ranks)
    walk.run()
    program.gm.graph.eliminate_dead_code()
    program.gm.graph.lint()
    program.gm.recompile()
    made = ", ".join(f"{count} {role}" for role, count in sorted(walk.redistribute.counts.items()))
    program.log.append(f"sequence parallel over {ranks} ranks: {made or 'nothing'}")
    return program


def module_of(node: fx.Node) -> str:
    """The module path that a node comes from, for messages."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values() if entry and entry[0]]
    return paths[-1] if paths else "the model's forward"


def operator_name(node: fx.Node) -> str:
    return node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else str(node.target)


def find_rule(node: fx.Node) -> Rule | None:
    rule = RULES.get(operator_name(node))
    if rule is None and is_tagged_pointwise(node.target):
        return pointwise
    return rule


def schema_values(node: fx.Node) -> dict[str, Any]:
    """All arguments by name, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    values: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):
        if position < len(node.args):
            values[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            values[argument.name] = node.kwargs[argument.name]
        else:
            values[argument.name] = argument.default_value
    return values


def is_mutating(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def is_random(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if operator_name(node) in ("aten::dropout", "aten::feature_dropout", "aten::native_dropout"):
        values = schema_values(node)
        return bool(values["p"]) and bool(values.get("train"))
    return torch.Tag.nondeterministic_seeded in node.target.tags and "attention" not in operator_name(node)


def is_data_dependent(node: fx.Node) -> bool:
    tags = node.target.tags if isinstance(node.target, torch._ops.OpOverload) else []
    return torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags


@dataclass
class Propagation:
    """One walk over the graph for one axis. `actual` / `virtual`: placements of each node's outputs. `active`: nodes
    that depend on the batch."""

    program: RankProgram
    ranks: int
    actual: dict[fx.Node, Placements] = field(default_factory=dict)
    virtual: dict[fx.Node, Placements] = field(default_factory=dict)
    restores: dict[fx.Node, Placement] = field(default_factory=dict)
    active: set[fx.Node] = field(default_factory=set)
    prepared: dict[tuple[Any, ...], fx.Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        graph = self.program.gm.graph
        group = self.program.group(AXIS)
        self.redistribute = Redistributor(graph, self.ranks, group, self._rank_input())

    def _rank_input(self) -> fx.Node:
        placeholders = self.program.gm.graph.find_nodes(op="placeholder")
        name = f"rank_{AXIS}"
        last = list(placeholders)[-1]
        with self.program.gm.graph.inserting_after(last):
            node = self.program.gm.graph.placeholder(name)
        node.meta["val"] = last.meta["val"].new_empty((), dtype=torch.int64)
        self.program.inputs[node.name] = InputSpec(AXIS, "rank")
        return node

    def run(self) -> None:
        for node in list(self.program.gm.graph.nodes):
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "get_attr":
                self.actual[node] = self.virtual[node] = (REPLICATE,)
            elif node.op == "output":
                self._output(node)
            elif node.target is operator.getitem:
                self._getitem(node)
            else:
                self._call_of_known_size(node)
        for node in self.program.gm.graph.nodes:
            if node.target is torch.ops.aten.view.default:
                # Pieces may have other strides than the whole had, so that a view of them may not exist.
                node.target = torch.ops.aten.reshape.default
        for node, placements in self.actual.items():
            node.meta["placement"] = placements if len(placements) > 1 else placements[0]

    def _placeholder(self, node: fx.Node) -> None:
        self.actual[node] = self.virtual[node] = (REPLICATE,)
        spec = self.program.inputs.get(node.name)
        if spec is not None and spec.kind in ("input", "host"):
            self.active.add(node)
        if spec is None or spec.token_dim is None:
            return
        shard = Shard(spec.token_dim)
        if self._counts_images(node):
            return
        if divides(node_shape(node), shard, self.ranks):
            self.virtual[node] = (shard,)
        elif any(self._cuts(user) for user in node.users):
            size = node_shape(node)[spec.token_dim]
            raise LoweringError(
                f"input {spec.name!r} has {size} tokens, which sp={self.ranks} does not divide: "
                f"pad the budget to {math.ceil(size / self.ranks) * self.ranks}, or choose another sp"
            )

    def _counts_images(self, node: fx.Node) -> bool:
        """Whether an input is a batch of images or clips whose block is cut along what becomes of each, not dealt
        out."""
        value = node.meta["val"]
        many = value.is_floating_point() and value.dim() >= 3
        return many and any(self._layout(user) is Layout.SEQUENCE for user in node.users)

    def _cuts(self, node: fx.Node) -> bool:
        return self._layout(node) in (Layout.SEQUENCE, Layout.IMAGES)

    def _layout(self, node: fx.Node) -> Layout:
        return self.program.block_of(node).layout

    def _getitem(self, node: fx.Node) -> None:
        source, position = node.args
        assert isinstance(source, fx.Node) and isinstance(position, int)

        if source in self.active:
            self.active.add(node)

        def pick(values: Placements) -> Placement:
            return values[position] if len(values) > 1 else values[0]

        self.actual[node] = (pick(self.actual[source]),)
        self.virtual[node] = (pick(self.virtual[source]),)
        target = self.restores.get(source)
        if target is not None and isinstance(node.meta["val"], torch.Tensor) and node_shape(node):
            self._restore(node, target)

    def _restore(self, node: fx.Node, target: Placement) -> None:
        (source,) = self.actual[node]
        if isinstance(target, Shard) and not divides(node_shape(node), target, self.ranks):
            return
        if source == target or not node.users:
            return
        new = self.redistribute.convert(node, source, target, node.next)
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self._set(new, target)

    def _set(self, node: fx.Node, *placements: Placement) -> None:
        self.actual[node] = self.virtual[node] = placements

    def _output(self, node: fx.Node) -> None:
        values = self.program.output_nodes()
        (loss,) = self.actual[values[0]]
        if isinstance(loss, Shard):
            raise LoweringError("the loss is not a scalar on every rank: reduce it in the model")
        new = self.redistribute.convert(values[0], loss, PARTIAL, node)
        self._set(new, PARTIAL)
        node.replace_input_with(values[0], new)
        rest = tuple(self.actual[v][0] for v in self.program.output_nodes()[1:])
        self.program.outputs = (PARTIAL, *rest)

    # Calls -----------------------------------------------------------------------------------------------------------

    def _tensors(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]

    def _effective(self, node: fx.Node) -> Placement:
        (actual,) = self.actual[node]
        return self.virtual[node][0] if isinstance(actual, Replicate) else actual

    def _call_of_known_size(self, node: fx.Node) -> None:
        try:
            self._call(node)
        except GuardOnDataDependentSymNode as error:
            raise LoweringError(
                f"{operator_name(node)} in {module_of(node)} takes tensors whose size depends on the data, which "
                "cannot be cut: keep the full size and mask it (torch.where)"
            ) from error

    def _call(self, node: fx.Node) -> None:
        tensors = self._tensors(node)
        if any(t in self.active for t in tensors):
            self.active.add(node)
        whole = all(isinstance(self.actual[t][0], Replicate) for t in tensors)
        self._refuse(node, whole)
        if node.target in _LINEAR_HELPERS:
            # Sums over data ranks, shape-preserving and linear: they lie as what they read.
            self._set(node, self.actual[tensors[0]][0])
            return
        if not self._cuts(node) or not isinstance(node.target, torch._ops.OpOverload):
            self._whole(node)
            return
        call = self._op_call(node, tensors)
        rule = find_rule(node)
        if rule is None or is_mutating(node):
            self._island(node, whole)
            return
        choices = rule(call)
        choice, against = self._best(call, choices)
        if choice is None and whole and (begun := self._begin(call, choices)) is not None:
            self._apply(call, begun)
        elif choice is None:
            self._whole_and_back(node)
        elif whole and (against >= _LOSES_CUT or not _all_float(node) or not any(map(self._cuts, node.users))):
            keep = against < _LOSES_CUT
            self._set(node, *(REPLICATE for _ in choice.outputs))
            self.virtual[node] = tuple(o if keep and isinstance(o, Shard) else REPLICATE for o in choice.outputs)
        else:
            self._apply(call, choice)

    def _begin(self, call: OpCall, choices: list[Choice]) -> Choice | None:
        """Cut a whole activation at a norm, whose input is [.., tokens, hidden], where no input could be cut before."""
        if call.name not in ("layer_norm", "rms_norm") or self._layout(call.node) is not Layout.SEQUENCE:
            return None
        tensor = call.values["input"]
        if tensor not in self.active or len(call.out) < 2:
            return None
        target = Shard(len(call.out) - 2)
        return next((c for c in choices if c.inputs == {"input": target}), None)

    def _refuse(self, node: fx.Node, whole: bool) -> None:
        if is_random(node):
            raise LoweringError(
                f"{operator_name(node)} in {module_of(node)} draws random numbers, which sp={self.ranks} ranks "
                "would draw differently: use dropout or torch.rand, which are keyed by place, or an input of the batch"
            )
        if is_mutating(node) and not whole:
            raise LoweringError(
                f"{operator_name(node)} in {module_of(node)} changes a cut tensor in place: write it out of place"
            )

    def _op_call(self, node: fx.Node, tensors: list[fx.Node]) -> OpCall:
        values = schema_values(node)
        placements = {t: self._effective(t) for t in tensors}
        return OpCall(node, operator_name(node).split("::")[-1], values, placements, self.ranks, self._layout(node))

    def _best(self, call: OpCall, choices: list[Choice]) -> tuple[Choice | None, float]:
        """The cheapest choice and how much it goes against virtual cuts; None for running the operator whole."""
        best: Choice | None = None
        best_score = self._score(call, Choice({}, (REPLICATE,)))
        for choice in choices:
            score = self._score(call, choice)
            if score < best_score or (score == best_score and best is None):
                best, best_score = choice, score
        return best, best_score[1]

    def _score(self, call: OpCall, choice: Choice) -> tuple[float, float]:
        sent, against = 0.0, 0.0
        for node, target in _requirements(call, choice):
            (actual,) = self.actual[node]
            value = node.meta["val"]
            nbytes = value.numel() * value.element_size()
            sent += self._cost(node, actual, target, nbytes)
            if isinstance(actual, Replicate):
                against += _against(self.virtual[node][0], target)
        value = call.node.meta["val"]
        first = value[0] if isinstance(value, tuple | list) else value
        nbytes = first.numel() * first.element_size() if isinstance(first, torch.Tensor) else 0
        if choice.restore is not None and sent < math.inf:
            sent += cost(choice.outputs[0], choice.restore, nbytes, self.ranks)
        if all(isinstance(p, Replicate) for p in choice.outputs) and self._any_cut(call.node):
            sent += nbytes  # what follows would be computed by every rank
        return sent, against

    def _any_cut(self, node: fx.Node) -> bool:
        return any(isinstance(self.actual[t][0], Shard) for t in self._tensors(node))

    def _cost(self, node: fx.Node, actual: Placement, target: Placement, nbytes: float) -> float:
        if isinstance(target, Shard) and not divides(node_shape(node), target, self.ranks) and actual != target:
            # Only a prepared argument (repeated heads) may be required cut where it does not divide.
            return nbytes
        return cost(actual, target, nbytes, self.ranks)

    def _whole(self, node: fx.Node) -> None:
        """Run on whole inputs: the result is whole on every rank."""
        for tensor in self._tensors(node):
            new = self.redistribute.convert(tensor, self.actual[tensor][0], REPLICATE, node)
            if new is not tensor:
                self._set(new, REPLICATE)
                node.replace_input_with(tensor, new)
        self._set(node, REPLICATE)

    def _island(self, node: fx.Node, whole: bool) -> None:
        """An operator without a rule: whole inputs, and its result cut again like the input of the same shape."""
        if is_data_dependent(node) and not whole:
            raise LoweringError(
                f"{operator_name(node)} in {module_of(node)} has a result whose size depends on the data, "
                "and no placement rule"
            )
        if not whole:
            self.program.notes.append(
                f"{operator_name(node)} in {module_of(node)} has no placement rule: runs whole on every rank"
            )
        self._whole_and_back(node)

    def _whole_and_back(self, node: fx.Node) -> None:
        """Run on whole inputs; a result of the shape of a cut input is cut like it again, which is free."""
        before = {t: self.actual[t][0] for t in self._tensors(node)}
        self._whole(node)
        value = node.meta["val"]
        if isinstance(value, torch.Tensor):
            for tensor, placement in before.items():
                if isinstance(placement, Shard) and node_shape(tensor) == tuple(value.shape):
                    self._restore(node, placement)
                    return

    def _apply(self, call: OpCall, choice: Choice) -> None:
        node = call.node
        values = dict(call.values)
        for name, value in call.values.items():
            required = choice.inputs.get(name, REPLICATE)
            if isinstance(value, tuple | list):
                values[name] = self._convert_list(value, required, node)
            elif isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor):
                assert not isinstance(required, tuple)
                values[name] = self._convert(value, required, node, choice.prepare.get(name))
        values.update({name: self.redistribute.rank if v is RANK else v for name, v in choice.args.items()})
        for name, size in choice.aligned.items():
            self.program.aligned[call.values[name].name] = size
        _write_arguments(node, values, call.values)
        outputs = choice.outputs
        self._set(node, *outputs)
        if choice.scale != 1.0:
            self._scale(node, choice.scale)
        elif choice.restore is not None and isinstance(node.meta["val"], torch.Tensor):
            self._restore(node, choice.restore)
        elif choice.restore is not None:
            self.restores[node] = choice.restore

    def _convert_list(self, value: Any, required: Any, user: fx.Node) -> list[Any]:
        items, position = [], 0
        for item in value:
            if isinstance(item, fx.Node) and isinstance(item.meta.get("val"), torch.Tensor):
                target = required[position] if isinstance(required, tuple) else required
                items.append(self._convert(item, target, user, None))
                position += 1
            else:
                items.append(item)
        return items

    def _convert(
        self,
        node: fx.Node,
        target: Placement,
        user: fx.Node,
        prepare: tuple[Callable[..., Any], tuple[Any, ...]] | None,
    ) -> fx.Node:
        (source,) = self.actual[node]
        if prepare is not None:
            function, extra = prepare
            prepared = self._prepared(node, function, extra, user)
            self._set(prepared, source)
            node = prepared
        new = self.redistribute.convert(node, source, target, user)
        if new is not node:
            self._set(new, target)
        return new

    def _prepared(self, node: fx.Node, function: Callable[..., Any], extra: tuple[Any, ...], user: fx.Node) -> fx.Node:
        """`function(node, *extra)`, made once for all users."""
        key = (node, function, extra)
        if key not in self.prepared:
            arguments = [self.redistribute.rank if e is RANK else e for e in extra]
            with self.program.gm.graph.inserting_before(user):
                new = self.program.gm.graph.call_function(function, (node, *arguments))
            new.meta = dict(node.meta)
            new.meta["val"] = function(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in [node, *arguments]))
            self.prepared[key] = new
        return self.prepared[key]

    def _scale(self, node: fx.Node, factor: float) -> None:
        graph = self.program.gm.graph
        with graph.inserting_after(node):
            new = graph.call_function(torch.ops.aten.mul.Tensor, (node, factor))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self._set(new, *self.actual[node])


def _requirements(call: OpCall, choice: Choice) -> list[tuple[fx.Node, Placement]]:
    """Every tensor of the call with the placement that the choice needs."""
    found: list[tuple[fx.Node, Placement]] = []
    positions: dict[str, int] = {}
    for name, node in call.tensors():
        required = choice.inputs.get(name, REPLICATE)
        if isinstance(required, tuple):
            at = positions.get(name, 0)
            positions[name] = at + 1
            required = required[at]
        found.append((node, required))
    return found


def _against(virtual: Placement, target: Placement) -> float:
    if isinstance(virtual, Shard):
        if virtual == target:
            return 0.0
        return _LOSES_CUT if isinstance(target, Replicate) else _MOVES_CUT
    return 0.0 if isinstance(target, Replicate) else _CUTS_PLAIN


def _all_float(node: fx.Node) -> bool:
    value = node.meta["val"]
    items = value if isinstance(value, tuple | list) else (value,)
    return any(isinstance(v, torch.Tensor) and v.is_floating_point() for v in items)


def _write_arguments(node: fx.Node, values: dict[str, Any], before: Mapping[str, Any]) -> None:
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    node.args = tuple(values[name] for name in names[: len(node.args)])
    kwargs = {name: values[name] for name in node.kwargs}
    for name in names[len(node.args) :]:
        if name not in kwargs and values[name] is not before[name]:
            kwargs[name] = values[name]
    node.kwargs = kwargs
