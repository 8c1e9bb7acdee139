"""Means over all tokens of the global batch, where a loss is not just a sum over tokens.

A load-balancing loss multiplies two means over tokens. Each micro-batch's own product is not what the whole batch
gives: the means must be taken over all data ranks before they are multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import fx

from omnicompile.errors import LoweringError
from omnicompile.passes import collectives
from omnicompile.passes.loss import is_sum_loss
from omnicompile.passes.placement import PARTIAL, REPLICATE, Partial, Placement, Replicate, Shard
from omnicompile.passes.propagate import Propagation, module_of, operator_name
from omnicompile.passes.rank_program import RankProgram, axis_size
from omnicompile.passes.redistribute import Redistributor, cost
from omnicompile.passes.rules.base import Choice, OpCall
from omnicompile.plan import Layout, Plan

_ACROSS = "dp_replicate,dp_shard"
_LOSS = "aten::cross_entropy_loss"


def insert_data_mean_pass(program: RankProgram, plan: Plan | None = None) -> RankProgram:
    """Average over data ranks what is a mean over tokens, before anything nonlinear reads it.

    Before: `m = mean(probabilities, 0); aux = m * f; loss = ce / count + aux`. After: `m =
    data_mean(mean(probabilities, 0)); aux = m * f; loss = (ce * n / count + aux) / n`, n data ranks. Sizes of a
    micro-batch that the model divides by are constants of the graph, so a sum over tokens divided by them is a mean
    too, and is averaged. So is a number that the model counts in its micro-batch: `losses.sum() / mask.sum()` becomes
    `losses.sum() / data_mean(mask.sum())`. Leaves a loss that is a sum of cross-entropies alone.

    Raises LoweringError for losses of single tokens that it cannot follow, and for other numbers of a micro-batch.
    """
    ranks = axis_size(program.mesh, _ACROSS)
    if ranks == 1 or not _needs_means(program):
        return program
    walk = DataPropagation(program, 1, across=ranks)
    for node in list(program.gm.graph.nodes):
        if is_sum_loss(node):  # a sum over the tokens of all data ranks, which is no mean of theirs
            _multiply(program, node, float(ranks))
    walk.run()
    (output,) = program.gm.graph.find_nodes(op="output")
    for loss in dict.fromkeys(n for n in program.output_nodes() if n.meta["val"].dim() == 0):
        with program.gm.graph.inserting_before(output):
            mean = program.gm.graph.call_function(collectives.share, (loss, ranks))
        mean.meta = dict(loss.meta)
        output.replace_input_with(loss, mean)
    program.gm.graph.lint()
    program.gm.recompile()
    program.log.append(f"global means: {walk.averager.averages} averages over {ranks} data ranks")
    return program


def _needs_means(program: RankProgram) -> bool:
    """Whether the loss is more than a sum of cross-entropies, each times something that is the same on all data ranks:
    it depends on another sum over tokens, on a cross-entropy in a way that is not linear, or on a summand that the data
    ranks share (a regularizer)."""
    scratch = program.copy()
    walk = DataPropagation(scratch, 1)
    walk.run()
    wanted = set()
    stack = [scratch.output_nodes()[0]]
    while stack:
        node = stack.pop()
        if node not in wanted:
            wanted.add(node)
            stack += node.all_input_nodes
    _refuse_numbers(scratch, wanted)
    for node in wanted:
        if operator_name(node) == _LOSS and isinstance(walk.actual[node][0], Replicate):
            raise LoweringError(
                f"the losses of single tokens in {module_of(node)} cannot be averaged over data ranks, as logits were "
                "cut off before: give whole logits and ignored targets, or use reduction='mean' or 'sum'"
            )
    other = any(node in wanted and operator_name(node) != _LOSS for node in walk.sums)
    return other or any(node.target is collectives.all_reduce or node in walk.averager.shared for node in wanted)


def _refuse_numbers(program: RankProgram, wanted: Collection[fx.Node]) -> None:
    """What is computed of a micro-batch other than by summing up is not known of all of them together."""
    for node in wanted:
        spec = program.inputs.get(node.name)
        if spec is None or spec.of_batch != "number":
            continue
        user = next((u for u in node.users if u in wanted and u.meta["val"].numel() == 1), None)
        if user is not None:
            raise LoweringError(
                f"the loss in {module_of(user)} depends on a number that the model computes from its batch, which each "
                "data rank would do for its own: sum up what you count (`mask.sum()`) and divide by that as it is"
            )


def _multiply(program: RankProgram, node: fx.Node, factor: float) -> None:
    with program.gm.graph.inserting_after(node):
        new = program.gm.graph.call_function(torch.ops.aten.mul.Tensor, (node, factor))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


@dataclass
class _Averager(Redistributor):
    """Tensors cut over data ranks stay so; a Partial one is averaged when something needs it whole. shared: what takes
    a tensor that is the same on all data ranks for a mean over them, which it is."""

    across: int = 1
    averages: int = 0
    shared: set[fx.Node] = field(default_factory=set)

    def convert(self, node: fx.Node, source: Placement, target: Placement, user: fx.Node) -> fx.Node:
        if isinstance(source, Partial) and isinstance(target, Replicate):
            return super().convert(node, source, target, user)
        if isinstance(source, Replicate) and isinstance(target, Partial):
            self.shared.add(user)
        return node

    def _insert(self, node: fx.Node, source: Placement, target: Placement) -> fx.Node:
        self.averages += 1
        part = self._emit(node, "data_share", collectives.share, self.across)
        return self._emit(part, "data_all_reduce", collectives.all_reduce, self.group)


@dataclass
class DataPropagation(Propagation):
    """Follows the tokens of every block, as if all were cut; `across` data ranks. sums: where tokens were summed up."""

    across: int = 1
    sums: list[fx.Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        group = self.program.group(_ACROSS) if self.across > 1 else ""
        self.averager = _Averager(self.program.gm.graph, 1, group, None, across=self.across)  # type: ignore[arg-type]
        self.redistribute = self.averager

    def _placeholder(self, node: fx.Node) -> None:
        super()._placeholder(node)
        spec = self.program.inputs.get(node.name)
        if spec is not None and spec.of_batch == "total":
            self.actual[node] = self.virtual[node] = (PARTIAL,)

    def _layout(self, node: fx.Node) -> Layout:
        return Layout.SEQUENCE

    def _cost(self, node: fx.Node, actual: Placement, target: Placement, nbytes: float) -> float:
        if isinstance(actual, Shard) and isinstance(target, Shard) and actual != target:
            return math.inf  # micro-batches are what they are
        return cost(actual, target, nbytes, max(2, self.across))

    def _refuse(self, node: fx.Node, whole: bool) -> None:
        """Every data rank has its own micro-batch: random numbers and changes in place are its own."""

    def _counts_images(self, node: fx.Node) -> bool:
        return False

    def _begin(self, call: OpCall, choices: list[Choice]) -> Choice | None:
        return None

    def _island(self, node: fx.Node, whole: bool) -> None:
        self._whole(node)

    def _output(self, node: fx.Node) -> None:
        self._set(node, REPLICATE)

    def _set(self, node: fx.Node, *placements: Placement) -> None:
        """A loss is of the tokens of a micro-batch, even where they were lost sight of."""
        super()._set(node, *((PARTIAL,) if is_sum_loss(node) else placements))

    def _apply(self, call: OpCall, choice: Choice) -> None:
        fresh = choice.outputs == (PARTIAL,) and not any(
            isinstance(self.actual[t][0], Partial) for t in self._tensors(call.node)
        )
        if fresh:
            self.sums.append(call.node)
        super()._apply(call, choice)
