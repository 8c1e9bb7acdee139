"""Dropout and uniform random numbers that do not depend on the layout: see dropout_op.py for how they are drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from omnicompile.anchors import experts as _experts  # noqa: F401  (defines the operators named below)
from omnicompile.errors import LoweringError
from omnicompile.passes import dropout_op
from omnicompile.passes.propagate import module_of, operator_name, schema_values
from omnicompile.passes.rank_program import BATCH_AXES, InputSpec, RankProgram
from omnicompile.plan import Plan

aten = torch.ops.aten
KEYED_DROPOUT = torch.ops.omnicompile.dropout.default
KEYED_UNIFORM = torch.ops.omnicompile.uniform.default
KEYED = {KEYED_DROPOUT: dropout_op.dropout_expanded, KEYED_UNIFORM: dropout_op.uniform_expanded}
_PLAIN, _CHANNELS = ("aten::dropout", "aten::native_dropout"), "aten::feature_dropout"
_DRAWS = ("aten::rand", "aten::rand_like", "aten::uniform", "aten::bernoulli")
_EXPERT_ROWS = torch.ops.omnicompile.expert_dispatch.default, torch.ops.omnicompile.expert_combine.default


def replace_dropout_pass(program: RankProgram, plan: Plan | None = None) -> RankProgram:
    """Replace dropout by `omnicompile::dropout`, and what is drawn uniformly, or by the toss of a coin, by
    `omnicompile::uniform`; each with a key that is an input.

    Before: `y = dropout(x, 0.1, True)`. After: `y = omnicompile.dropout(x, dropout_key_0, rank_data, None, 0.1, 1, 1)`.
    Dropout of whole channels becomes a product with such a dropout of ones. Safe because the operator is pure: a
    second run, a cut and the backward drop the same elements. Raises LoweringError for dropout inside attention and
    inside expert layers, whose elements have no place in the batch.
    """
    graph = program.gm.graph
    _refuse(graph)
    found = [node for node in graph.nodes if drops(node) or _draws(node)]
    if not found:
        return program
    batch = _of_the_batch(program)
    keys = [_placeholder(program, f"dropout_key_{i}", InputSpec(str(i), "dropout")) for i in range(len(found))]
    data_rank = _placeholder(program, "rank_data", InputSpec(BATCH_AXES, "rank"))
    for node, key in zip(found, keys):
        own = data_rank if node in batch or operator_name(node) == "aten::rand" else None
        (_replace if drops(node) else _replace_draw)(node, key, own)
    graph.lint()
    program.gm.recompile()
    program.log.append(f"random operators: {len(found)} keyed by place")
    return program


def drops(node: fx.Node) -> bool:
    """Whether it is a dropout that changes its input."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if operator_name(node) not in (*_PLAIN, _CHANNELS):
        return False
    values = schema_values(node)
    return bool(values["p"]) and values["train"] is not False


def _draws(node: fx.Node) -> bool:
    return (
        node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and operator_name(node) in _DRAWS
        and node.meta["val"].is_floating_point()
    )


def _refuse(graph: fx.Graph) -> None:
    rows: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        named = any(argument.name == "dropout_p" for argument in node.target._schema.arguments)
        if named and schema_values(node)["dropout_p"]:
            raise LoweringError(
                f"{operator_name(node)} in {module_of(node)} has attention dropout, which does not go by the place of "
                "an element: set the attention dropout probability to 0"
            )
        inside = any(source in rows for source in node.all_input_nodes) and node.target is not _EXPERT_ROWS[1]
        if node.target is _EXPERT_ROWS[0] or inside:
            rows.add(node)
        if inside and (drops(node) or _draws(node)):
            raise LoweringError(
                f"{operator_name(node)} in {module_of(node)} draws for rows of an expert layer, whose order depends on "
                "the layout: set this dropout probability to 0"
            )


def _of_the_batch(program: RankProgram) -> set[fx.Node]:
    """Nodes that depend on the batch."""
    found: set[fx.Node] = set()
    for node in program.gm.graph.nodes:
        spec = program.inputs.get(node.name) if node.op == "placeholder" else None
        if (spec is not None and spec.kind in ("input", "host")) or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _placeholder(program: RankProgram, name: str, spec: InputSpec) -> fx.Node:
    last = list(program.gm.graph.find_nodes(op="placeholder"))[-1]
    with program.gm.graph.inserting_after(last):
        node = program.gm.graph.placeholder(name)
    node.meta["val"] = last.meta["val"].new_empty((), dtype=torch.int64)
    program.inputs[node.name] = spec
    return node


def _replace(node: fx.Node, key: fx.Node, data_rank: fx.Node | None) -> None:
    values = schema_values(node)
    x = values["input"]
    with node.graph.inserting_before(node):
        if operator_name(node) == _CHANNELS:
            shape = x.meta["val"].shape
            ones = _emit(node, aten.new_ones.default, x, [*shape[:2], *([1] * (len(shape) - 2))])
            scale = _emit(node, KEYED_DROPOUT, ones, key, data_rank, None, values["p"], 1, 1)
            new = _emit(node, aten.mul.Tensor, x, scale)
        else:
            new = _emit(node, KEYED_DROPOUT, x, key, data_rank, None, values["p"], 1, 1)
    if operator_name(node) != "aten::native_dropout":
        node.replace_all_uses_with(new)
    else:
        for user in list(node.users):
            if user.args[1] != 0 and user.users:
                raise LoweringError(f"the mask of {operator_name(node)} in {module_of(node)} is read: use its output")
            user.replace_all_uses_with(new)
            node.graph.erase_node(user)
    name = node.name
    node.graph.erase_node(node)
    new.name = name


def _replace_draw(node: fx.Node, key: fx.Node, data_rank: fx.Node | None) -> None:
    values, value, name = schema_values(node), node.meta["val"], operator_name(node)
    with node.graph.inserting_before(node):
        if name == "aten::rand":
            like = node.graph.call_function(
                aten.zeros.default, (list(value.shape),), {"dtype": value.dtype, "device": value.device}
            )
            like.meta = dict(node.meta)
        else:
            like = _emit(node, aten.detach.default, values["self"])
            if like.meta["val"].dtype != value.dtype:
                like = _emit(node, aten.to.dtype, like, value.dtype)
        new = _emit(node, KEYED_UNIFORM, like, key, data_rank, None, 1, 1)
        if name == "aten::bernoulli":
            p = values.get("p", like)
            below = _emit(node, aten.lt.Tensor if isinstance(p, fx.Node) else aten.lt.Scalar, new, p)
            new = _emit(node, aten.to.dtype, below, value.dtype)
        elif name == "aten::uniform" and (values["from"], values["to"]) != (0.0, 1.0):
            scaled = _emit(node, aten.mul.Tensor, new, values["to"] - values["from"])
            new = _emit(node, aten.add.Tensor, scaled, values["from"])
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _emit(like: fx.Node, function: Callable[..., Any], *args: Any) -> fx.Node:
    new = like.graph.call_function(function, args)
    new.meta = dict(like.meta)
    new.meta["val"] = function(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in args))
    return new


def expand_dropout(gm: fx.GraphModule) -> fx.GraphModule:
    """Write operators keyed by place in plain ones, in place, for a compiler to fuse."""
    found = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in KEYED]
    for node in found:
        node.target = KEYED[node.target]
    if found:
        gm.recompile()
    return gm


class KeyedDropout(TorchFunctionMode):
    """While active, a model run by one process drops and draws what a lowered one does on all its ranks together, given
    the joined batch and the same seed: sites are numbered in the order of their calls. For comparisons."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed, self.site = seed, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (functional.dropout, torch.dropout):
            return self._elements(*args, **(kwargs or {}))
        if func in (functional.dropout1d, functional.dropout2d, functional.dropout3d):
            return self._channels(*args, **(kwargs or {}))
        if func is torch.rand:
            return self._uniform(torch.zeros(*args, **(kwargs or {})))
        if func is torch.rand_like:
            return self._uniform(torch.zeros_like(*args, **(kwargs or {})))
        if func in (torch.bernoulli, Tensor.bernoulli, Tensor.bernoulli_):
            return self._toss(func is Tensor.bernoulli_, *args, **(kwargs or {}))
        if func is Tensor.uniform_:
            return self._between(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _key(self, device: torch.device) -> Tensor:
        self.site += 1
        return dropout_op.site_keys(self.seed, self.site)[-1].to(device)

    def _uniform(self, like: Tensor) -> Tensor:
        return dropout_op.uniform(like.detach(), self._key(like.device), None, None, 1, 1)

    def _toss(self, in_place: bool, input: Tensor, p: float | Tensor | None = None) -> Tensor:
        chance = (0.5 if in_place else input) if p is None else p
        result = (self._uniform(input) < chance).to(input.dtype)
        return input.copy_(result) if in_place else result

    def _between(self, input: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
        return input.copy_(self._uniform(input) * (high - low) + low)

    def _elements(
        self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, train: bool = True
    ) -> Tensor:
        if not p or not (training and train):
            return input
        result = dropout_op.dropout(input, self._key(input.device), None, None, p, 1, 1)
        return input.copy_(result) if inplace else result

    def _channels(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        ones = input.new_ones(*input.shape[:2], *([1] * (input.dim() - 2)))
        result = input * self._elements(ones, p, training)
        return input.copy_(result) if inplace else result
