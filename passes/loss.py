"""Losses normalised by the number of target tokens of the whole global batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from omnicompile.errors import LoweringError
from omnicompile.passes.propagate import module_of, schema_values
from omnicompile.passes.rank_program import InputSpec, RankProgram
from omnicompile.plan import Plan

_MEAN, _SUM = 1, 2
COUNT = "num_targets"


def normalise_loss_pass(program: RankProgram, plan: Plan | None = None) -> RankProgram:
    """A mean over this rank's targets becomes a sum over the global count, which the runtime feeds.

    Before: `l = cross_entropy_loss(logits, labels)`. After: `l = cross_entropy_loss(logits, labels, reduction=sum) /
    num_targets`. Ranks have different numbers of targets, so the mean of means is not the mean; with the sum, the
    losses of all ranks and micro-steps add up to the global mean, and so do the gradients. Several losses have a count
    each: `num_targets`, `num_targets_1`, ..., in the order of the graph.
    """
    means = [n for n in program.gm.graph.nodes if is_mean_loss(n)]
    for number, node in enumerate(means):
        if schema_values(node)["weight"] is not None:
            raise LoweringError(
                f"a class-weighted mean loss in {module_of(node)} is not supported: use reduction='sum'"
            )
        _rewrite(program, node, _count_input(program, count_name(number)))
    program.gm.graph.lint()
    program.gm.recompile()
    program.log.append(f"loss: {len(means)} means over targets became sums over the global count")
    return program


def count_name(number: int) -> str:
    """The input that holds the number of targets of the loss with this number."""
    return COUNT if number == 0 else f"{COUNT}_{number}"


def count_values(targets: float | Sequence[int], ranks: int = 1) -> dict[str, Tensor]:
    """The values of the count inputs where each of `ranks` ranks has `targets` targets, of each loss. A loss without
    targets is 0."""
    counts = targets if isinstance(targets, Sequence) else [targets]
    return {count_name(i): torch.tensor(float(max(1, count * ranks))) for i, count in enumerate(counts)}


def is_mean_loss(node: fx.Node) -> bool:
    """Whether a node is a cross-entropy averaged over its targets."""
    return _is_loss(node, _MEAN)


def is_sum_loss(node: fx.Node) -> bool:
    """Whether a node is a cross-entropy summed over its targets."""
    return _is_loss(node, _SUM)


def _is_loss(node: fx.Node, reduction: int) -> bool:
    return node.target is torch.ops.aten.cross_entropy_loss.default and schema_values(node)["reduction"] == reduction


def _count_input(program: RankProgram, name: str) -> fx.Node:
    placeholders = list(program.gm.graph.find_nodes(op="placeholder"))
    with program.gm.graph.inserting_after(placeholders[-1]):
        node = program.gm.graph.placeholder(name)
    node.meta["val"] = placeholders[0].meta["val"].new_empty((), dtype=torch.float32)
    program.inputs[node.name] = InputSpec(name, "count")
    return node


def _rewrite(program: RankProgram, node: fx.Node, count: fx.Node) -> None:
    values = schema_values(node)
    values["reduction"] = _SUM
    names = [argument.name for argument in torch.ops.aten.cross_entropy_loss.default._schema.arguments]
    node.args, node.kwargs = tuple(values[name] for name in names), {}
    with program.gm.graph.inserting_after(node):
        mean = program.gm.graph.call_function(torch.ops.aten.div.Tensor, (node, count))
    mean.meta = dict(node.meta)
    node.replace_all_uses_with(mean, delete_user_cb=lambda user: user is not mean)
