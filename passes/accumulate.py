"""Gradients of a micro-step are added to those of the micro-steps before it, each as soon as it is there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

KEPT = "kept_"
"""Begins the names of placeholders for gradients of earlier micro-steps."""


def accumulate_pass(gm: fx.GraphModule, gradients: Sequence[str]) -> tuple[str, ...]:
    """Changes a step graph in place. Returns the new placeholders, behind all others: one for each of `gradients`, the
    placeholders of the parameters whose gradients follow the loss in the output.

    Before:  step(..., w1, w2):  g2 = f(..); g1 = h(..);  return loss, g1, g2
    After:   step(..., w1, w2, kept_w1, kept_w2):
                 g2 = f(..); s2 = add_(kept_w2, g2); g1 = h(..); s1 = add_(kept_w1, g1);  return loss, s1, s2

    So no second set of gradients builds up beside the kept one, and what is returned is the sum so far.

    Safe: the caller gives up what it has kept, nothing else reads it, and sums are made in the order of micro-steps.
    Runs after `overlap_pass`, before `sum_over_replicas_pass`.
    """
    output = gm.graph.output_node()
    results = output.args[0]
    assert isinstance(results, tuple | list)
    loss, found, others = results[0], results[1 : len(gradients) + 1], results[len(gradients) + 1 :]
    *_, last = gm.graph.find_nodes(op="placeholder")
    sums: list[fx.Node] = []
    names: list[str] = []
    for name, gradient in zip(gradients, found):
        assert isinstance(gradient, fx.Node)
        with gm.graph.inserting_after(last):
            last = gm.graph.placeholder(KEPT + name)
        last.meta = {key: value for key, value in gradient.meta.items() if key in ("block", "param")}
        last.meta["val"] = _like(gradient)
        with gm.graph.inserting_after(gradient if gradient.op == "call_function" else last):
            total = gm.graph.call_function(torch.ops.aten.add_.Tensor, (last, gradient))
        total.meta = {**gradient.meta, "val": last.meta["val"], "phase": "accumulate"}
        names.append(last.name)
        sums.append(total)
    output.args = ((loss, *sums, *others),)
    gm.graph.lint()
    gm.recompile()
    return tuple(names)


def is_kept(node: fx.Node) -> bool:
    """Whether it is a placeholder made here."""
    return node.op == "placeholder" and node.name.startswith(KEPT)


def _like(gradient: fx.Node) -> Tensor:
    value = gradient.meta["val"]
    assert isinstance(value, Tensor)
    return torch.empty_like(value)
