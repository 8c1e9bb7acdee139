"""Means over all tokens of the global batch, where a loss is not just a sum over tokens.

A load-balancing loss multiplies two means over tokens. Each micro-batch's own product is not what the whole batch
gives: the means must be taken over all data ranks before they are multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

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
_KEEPS_COUNT = frozenset({"aten::to", "aten::_to_copy", "aten::clamp", "aten::detach", "aten::alias"})


def insert_data_mean_pass(program: RankProgram, plan: Plan | None = None) -> RankProgram:
    """Average over data ranks what is a mean over tokens, before anything nonlinear reads it.

    Before: `m = mean(probabilities, 0); aux = m * f; loss = ce / count + aux`. After: `m =
    data_mean(mean(probabilities, 0)); aux = m * f; loss = (ce * n / count + aux) / n`, n data ranks. Sizes of a
    micro-batch that the model divides by are constants of the graph, so a sum over tokens divided by them is a mean
    too, and is averaged. So is a count over its micro-batch that the model divides by: `losses.sum() / mask.sum()`
    becomes `losses.sum() / data_mean(mask.sum())`. Leaves a loss that is a sum of cross-entropies alone.

    Raises LoweringError for losses of single tokens that it cannot follow, and for other numbers of a micro-batch.
    """
    ranks = axis_size(program.mesh, _ACROSS)
    if ranks == 1:
        return program
    _refuse_numbers(program)
    if not _needs_means(program):
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
    wanted = _of_loss(scratch)
    for node in wanted:
        if operator_name(node) == _LOSS and isinstance(walk.actual[node][0], Replicate):
            raise LoweringError(
                f"the losses of single tokens in {module_of(node)} cannot be averaged over data ranks, as logits were "
                "cut off before: give whole logits and ignored targets, or use reduction='mean' or 'sum'"
            )
    other = any(node in wanted and operator_name(node) != _LOSS for node in walk.sums)
    own = isinstance(walk.actual[scratch.output_nodes()[0]][0], Replicate)  # a mean over a rank's samples, say
    return other or own or any(node.target is collectives.all_reduce or node in walk.averager.shared for node in wanted)


def _of_loss(program: RankProgram) -> dict[fx.Node, None]:
    """What the loss depends on."""
    wanted: dict[fx.Node, None] = {}
    stack = [program.output_nodes()[0]]
    while stack:
        node = stack.pop()
        if node not in wanted:
            wanted[node] = None
            stack += node.all_input_nodes
    return wanted


def _refuse_numbers(program: RankProgram) -> None:
    """Of numbers that a model computes from its micro-batch, only counts that it divides by are known of all data ranks
    together. Looks at what is done with losses, and at what single numbers are made of."""
    graph, losses, wanted = program.gm.graph, set[fx.Node](), _of_loss(program)
    for node in graph.nodes:
        if operator_name(node) == _LOSS or any(source in losses for source in node.all_input_nodes):
            losses.add(node)
    sums = [n for n in graph.nodes if n in wanted and is_sum_loss(n) and not _normalised(program, n)]
    for node in graph.find_nodes(op="placeholder"):
        spec = program.inputs.get(node.name)
        if node not in wanted or spec is None or not spec.of_batch:
            continue
        for user in _uses(node, wanted, losses):
            if spec.of_batch == "number" or operator_name(user) != "aten::div" or user.args[1] not in _same(node):
                raise LoweringError(
                    f"the loss in {module_of(user)} depends on a number that the model computes from its batch, which "
                    "each data rank would do for its own: divide by a count (`mask.sum()`) as it is"
                )
            if sums:
                raise LoweringError(
                    f"the loss in {module_of(user)} divides by a number counted in the batch, beside a cross-entropy "
                    f"with reduction='sum' in {module_of(sums[0])}: use reduction='mean', which all data ranks share"
                )


def _normalised(program: RankProgram, loss: fx.Node) -> bool:
    """Whether a sum of losses is divided by the number of targets of all ranks, which the runtime gives."""
    counts = {name for name, spec in program.inputs.items() if spec.kind == "count"}
    return any(source.name in counts for user in loss.users for source in user.all_input_nodes)


def _same(number: fx.Node) -> set[fx.Node]:
    """The number, cast or held from below too."""
    found, stack = {number}, [number]
    while stack:
        for user in stack.pop().users:
            if operator_name(user) in _KEEPS_COUNT and user not in found:
                found.add(user)
                stack.append(user)
    return found


def _uses(number: fx.Node, wanted: Collection[fx.Node], losses: Collection[fx.Node]) -> list[fx.Node]:
    """What reads a number, cast or not, in the computation of the loss: losses, or other single numbers."""
    same = _same(number)
    users = [user for node in same for user in node.users if user not in same and user in wanted]
    return [user for user in users if user in losses or _is_number(user)]


def _is_number(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 0


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
        if fresh and self._of_each_sample(call.node):
            choice = replace(choice, outputs=(REPLICATE,))
        elif fresh:
            self.sums.append(call.node)
        super()._apply(call, choice)

    def _of_each_sample(self, node: fx.Node) -> bool:
        """Whether tokens are summed up sample by sample, as pooling does: that is each data rank's own."""
        (source, *_), value = self._tensors(node), node.meta["val"]
        whole, placed = source.meta["val"], self.actual[source][0]
        if not isinstance(placed, Shard) or placed.dim == 0 or value.dim() == 0:
            return False
        return value.shape[0] == whole.shape[0] and whole.shape[0] in self._batch_sizes()

    def _batch_sizes(self) -> set[int]:
        """Samples in a micro-batch, by the inputs that have tokens along the second of two dimensions."""
        nodes = self.program.gm.graph.find_nodes(op="placeholder")
        specs = [(self.program.inputs.get(node.name), node.meta["val"]) for node in nodes]
        return {
            value.shape[0] for spec, value in specs if spec is not None and spec.token_dim == 1 and value.dim() == 2
        }
