"""Sizes that a step graph asks tensors for are worked out from the numbers that the tensors were made with."""

from __future__ import annotations

import operator
from collections.abc import Callable

import sympy
import torch
from torch import fx

_SIZE = torch.ops.aten.sym_size.int


def known_sizes_pass(gm: fx.GraphModule) -> int:
    """Change a step graph in place, before anything of it is moved. Returns how many sizes are no longer asked for.

    Before: `a = to_number(..); b = to_number(..); y = exchange(x, [a, b], ..); z = f(y); ...; n = size(y, 0);
    d = narrow(g, 0, 0, n)`. After: `n = a + b; d = narrow(g, 0, 0, n)`: `y` dies in the forward.

    Autograd asks for sizes in the backward (of the parts of a concatenation, say), and a tensor lives until its size is
    read. Safe because the size is that sum: it is the expression by which the trace knows it.
    """
    known: dict[sympy.Expr, fx.Node] = {}
    count = 0
    for node in list(gm.graph.nodes):
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, torch.SymInt):
            continue
        expression = value.node.expr
        if node.target is not _SIZE:
            known.setdefault(expression, node)
            continue
        if expression not in known and (made := _worked_out(gm.graph, node, expression, known)) is not None:
            known[expression] = made
        if expression in known:
            node.replace_all_uses_with(known[expression])
            gm.graph.erase_node(node)
            count += 1
    if count:
        gm.graph.lint()
        gm.recompile()
    return count


def _worked_out(
    graph: fx.Graph, size: fx.Node, expression: sympy.Expr, known: dict[sympy.Expr, fx.Node]
) -> fx.Node | None:
    """A sum of multiples of numbers that are there, put before `size`; None for any other expression."""
    total: fx.Node | int | None = None
    terms = [term.as_coeff_Mul() for term in sympy.Add.make_args(expression)]
    if not all(factor.is_Integer and (rest in known or rest == 1) for factor, rest in terms):
        return None
    with graph.inserting_before(size):
        for factor, rest in terms:
            term: fx.Node | int = int(factor) if rest == 1 else known[rest]
            if rest != 1 and factor != 1:
                term = _call(graph, operator.mul, term, int(factor))
            total = term if total is None else _call(graph, operator.add, total, term)
    return total if isinstance(total, fx.Node) else None


def _call(graph: fx.Graph, function: Callable[..., int], *args: fx.Node | int) -> fx.Node:
    node = graph.call_function(function, args)
    source = node.all_input_nodes[0]
    node.meta = {**source.meta, "val": function(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in args))}
    return node
