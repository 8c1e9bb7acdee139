"""A product that makes query, key and value at once becomes a product for each: one travels while the next computes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from omnicompile.capture.classify import HEAVY
from omnicompile.passes.propagate import operator_name, schema_values
from omnicompile.passes.rank_program import RankProgram
from omnicompile.plan import Layout, Plan

_aten = torch.ops.aten
_ATTENTION = torch.ops.omnicompile.attention.default
_PARTS = 3  # its first arguments: query, key, value


@dataclass(frozen=True)
class _Operands:
    """Names of a product's arguments, and the dimension of the weight that runs along its result's last."""

    weight: str
    dim: int
    bias: str | None = None


_PRODUCTS = {
    _aten.linear.default: _Operands("weight", 0, "bias"),
    _aten.addmm.default: _Operands("mat2", 1, "self"),
    _aten.mm.default: _Operands("mat2", 1),
    _aten.matmul.default: _Operands("other", 1),
}
_SAME_ORDER = frozenset({"aten::contiguous", "aten::clone"})
_RESHAPES = frozenset({"aten::view", "aten::reshape", "aten::flatten", "aten::unflatten"})
_VIEWS = frozenset(
    f"aten::{name}"
    for name in ("permute", "transpose", "movedim", "unsqueeze", "squeeze", "split", "split_with_sizes", "chunk",
                 "unbind", "select", "slice", "narrow")
)  # fmt: skip


def split_fused_qkv_pass(program: RankProgram, plan: Plan | None = None) -> RankProgram:
    """Give query, key and value products of their own where one makes them together and they are to be exchanged.

    Before: `y = linear(x, w, b); q, k, v = unbind(permute(view(y, [T, 3, H, D]), [1, 0, 2, 3])); o = attention(f(q),
    f(k), v)`. After: `wq, wk, wv = split(w, [H * D] * 3); bq, ... = split(b, ...); q = view(linear(x, wq, bq), [T, H,
    D]); k = ...`. Where rows of the three alternate (from head to head), each one's rows are put together first.

    Only with the schedule of exchanges, in blocks that are cut along their sequence, and where each slice is all of
    what attention takes as its query, key or value (or two of them, and is then cut once more). Autograd gives one
    gradient of the whole weight: the slices' gradients put together once. Safe because every element of the result is
    the same sum of the same numbers; the gradient of `x`, a sum over all three, is summed in another order. Runs
    before placements are decided, on whole shapes.
    """
    found = 0
    if program.overlap.exchanges and program.mesh.sp > 1:
        todo = [node for node in program.gm.graph.nodes if node.target in _PRODUCTS]
        while todo:
            made = _split(program, todo.pop())
            found += bool(made)
            todo += made
        program.gm.graph.eliminate_dead_code()
        program.gm.graph.lint()
        program.gm.recompile()
    program.log.append(f"products of query, key and value: {found} split")
    return program


@dataclass(frozen=True)
class _Slice:
    """What `node` takes of the columns of a product: in each of `runs` equal parts those from `start` on, `length` of
    them. sizes: of its dimensions in the order in which its elements lie; order: of these, where each of its own is."""

    node: fx.Node
    runs: int
    start: int
    length: int
    sizes: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def columns(self) -> int:
        return self.runs * self.length


def _split(program: RankProgram, product: fx.Node) -> list[fx.Node]:
    """The new products; none where there is nothing to split."""
    if program.block_of(product).layout is not Layout.SEQUENCE or not _is_plain(product):
        return []
    groups = _groups(_slices(product), product.meta["val"].shape[-1])
    if len(groups) < 2 or not _feeds_attention(groups):
        return []
    return _Rewrite(program.gm.graph, product, groups).run()


def _is_plain(product: fx.Node) -> bool:
    """A product with a matrix and at most a vector, all of known size."""
    operands, values = _PRODUCTS[product.target], schema_values(product)  # type: ignore[index]
    weight, result = _value(values[operands.weight]), _value(product)
    if weight is None or weight.dim() != 2 or result is None or not all(isinstance(s, int) for s in result.shape):
        return False
    bias = _value(values[operands.bias]) if operands.bias else None
    return (bias is None or bias.dim() == 1) and all(values.get(name, 1) == 1 for name in ("alpha", "beta"))


def _value(node: object) -> Tensor | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


# What is read of a product


def _slices(product: fx.Node) -> list[_Slice]:
    """The slices through which alone a product is read; none if it is read otherwise. Views are followed on a tensor
    without memory, whose strides tell which columns a view has."""
    result = _value(product)
    assert result is not None
    whole = torch.empty(result.shape, dtype=result.dtype, device="meta")
    seen: dict[fx.Node, Tensor | tuple[Tensor, ...]] = {product: whole}
    found: list[_Slice] = []
    stack = [product]
    while stack:
        source = stack.pop()
        for user in source.users:
            value = _followed(user, source, seen[source])
            if value is None:
                return []
            if isinstance(value, Tensor) and value.numel() < whole.numel():
                piece = _slice_of(user, value, whole)
                if piece is None:
                    return []
                found.append(piece)
            else:
                seen[user] = value
                stack.append(user)
    return found


def _followed(user: fx.Node, source: fx.Node, value: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...] | None:
    """The value of a view, by that of what it views; None for anything else."""
    if user.op != "call_function" or user.all_input_nodes != [source] or user.args[0] is not source:
        return None
    if isinstance(value, tuple):
        number = user.args[1]
        return value[number] if isinstance(number, int) else None
    name = operator_name(user)
    if name in _SAME_ORDER:
        return value
    if name in _RESHAPES:
        shaped = _value(user)
        return _reshaped(value, shaped) if shaped is not None else None
    if name not in _VIEWS:
        return None
    made = user.target(value, *user.args[1:], **user.kwargs)  # type: ignore[operator]
    return made if isinstance(made, Tensor) else tuple(made)


def _reshaped(value: Tensor, like: Tensor) -> Tensor | None:
    """None where that would take a copy."""
    try:
        return value.view(like.shape) if like.dtype == value.dtype else None
    except RuntimeError:
        return None


def _slice_of(node: fx.Node, value: Tensor, whole: Tensor) -> _Slice | None:
    """None if it has not all rows, or columns that lie otherwise."""
    width = whole.shape[-1]
    lying = sorted(range(value.dim()), key=lambda dim: -value.stride(dim))
    columns: list[list[int]] = []  # [size, stride], neighbours joined
    rows = 1
    for dim in lying:
        size, stride = value.shape[dim], value.stride(dim)
        if size == 1:
            continue
        if stride >= width:
            rows *= size
        elif columns and columns[-1][1] == size * stride:
            columns[-1] = [columns[-1][0] * size, stride]
        else:
            columns.append([size, stride])
    if not columns or columns[-1][1] != 1:
        columns.append([1, 1])
    start, length = value.storage_offset(), columns[-1][0]
    runs, period = columns[0] if len(columns) == 2 else (1, width)
    if len(columns) > 2 or rows * width != whole.numel() or runs * period != width or start + length > period:
        return None
    order = tuple(lying.index(dim) for dim in range(value.dim()))
    return _Slice(node, runs, start, length, tuple(value.shape[dim] for dim in lying), order)


def _groups(slices: Sequence[_Slice], width: int) -> list[list[_Slice]]:
    """Slices of the same columns together, in the order of the columns; none if they do not make up the whole."""
    by_start: dict[int, list[_Slice]] = {}
    for piece in slices:
        by_start.setdefault(piece.start, []).append(piece)
    groups = [by_start[start] for start in sorted(by_start)]
    at = 0
    for group in groups:
        if group[0].start != at or {(p.runs, p.length) for p in group} != {(slices[0].runs, group[0].length)}:
            return []
        at += group[0].length
    return groups if slices and at * slices[0].runs == width else []


def _feeds_attention(groups: Sequence[Sequence[_Slice]]) -> bool:
    """Whether each group is all of one or more of the query, key and value of one attention."""
    taken: set[int] = set()
    calls: set[fx.Node] = set()
    for group in groups:
        inputs = {(call, i) for piece in group for call, i in _reached(piece.node)}
        numbers = {i for _, i in inputs}
        calls |= {call for call, _ in inputs}
        if not inputs or len(calls) > 1 or taken & numbers:
            return False
        (call,) = calls
        if group[0].columns != sum(_width_of_argument(call, i) for i in numbers):
            return False
        taken |= numbers
    return True


def _reached(node: fx.Node) -> set[tuple[fx.Node, int]]:
    """Query (0), key (1) and value (2) arguments that a value leads to without a product between."""
    found: set[tuple[fx.Node, int]] = set()
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        source = stack.pop()
        for user in source.users:
            if user.target is _ATTENTION:
                found |= {(user, i) for i in range(_PARTS) if user.args[i] is source}
            elif user not in seen and user.target not in HEAVY:
                seen.add(user)
                stack.append(user)
    return found


def _width_of_argument(call: fx.Node, number: int) -> int:
    """Elements per token of [batch, heads, tokens, head_dim]."""
    value = _value(call.args[number])
    assert value is not None
    return int(value.shape[1] * value.shape[3])


# What takes its place


class _Rewrite:
    """Puts a product for each group of slices in the place of one for all."""

    def __init__(self, graph: fx.Graph, product: fx.Node, groups: Sequence[Sequence[_Slice]]) -> None:
        self.graph, self.product, self.groups = graph, product, groups
        self.runs = groups[0][0].runs
        self.lengths = [group[0].length for group in groups]
        self.operands = _PRODUCTS[product.target]  # type: ignore[index]

    def run(self) -> list[fx.Node]:
        values = schema_values(self.product)
        names = [argument.name for argument in self.product.target._schema.arguments]  # type: ignore[union-attr]
        given = [name for name in names if name in (self.operands.weight, self.operands.bias) or name in names[:2]]
        with self.graph.inserting_before(self.product):
            weights = self._cut(values[self.operands.weight], self.operands.dim)
            bias = values[self.operands.bias] if self.operands.bias else None
            biases = self._cut(bias, 0) if isinstance(bias, fx.Node) else [bias] * len(self.groups)
            products = []
            for weight, one in zip(weights, biases):
                own = {**values, self.operands.weight: weight}
                own |= {self.operands.bias: one} if self.operands.bias else {}
                products.append(self._call(self.product.target, *(own[name] for name in given)))
        for made, group in zip(products, self.groups):
            for piece in group:
                self._read(piece, made)
        return products

    def _cut(self, whole: fx.Node, dim: int) -> list[fx.Node]:
        """The rows (columns of a weight that is stored the other way) of each group: views of `whole` where they are
        neighbours."""
        shape = list(whole.meta["val"].shape)
        if self.runs == 1:
            parts = self._call(_aten.split_with_sizes.default, whole, self.lengths, dim)
            return [self._call(operator.getitem, parts, i) for i in range(len(self.lengths))]
        shape[dim : dim + 1] = [self.runs, sum(self.lengths)]
        folded = self._call(_aten.view.default, whole, shape)
        parts = self._call(_aten.split_with_sizes.default, folded, self.lengths, dim + 1)
        found = []
        for i, length in enumerate(self.lengths):
            shape[dim : dim + 2] = [self.runs, length]
            together = [*shape[:dim], self.runs * length, *shape[dim + 2 :]]
            found.append(self._call(_aten.reshape.default, self._call(operator.getitem, parts, i), together))
        return found

    def _read(self, piece: _Slice, product: fx.Node) -> None:
        """Make the slice a view of its own product; it keeps its name."""
        node = piece.node
        if list(piece.order) == sorted(piece.order):
            node.target, node.args = _aten.view.default, (product, list(piece.sizes))
        else:
            with self.graph.inserting_before(node):
                lying = self._call(_aten.view.default, product, list(piece.sizes))
            node.target, node.args = _aten.permute.default, (lying, list(piece.order))
        node.kwargs = {}
        node.meta["val"] = self._value(node)

    def _call(self, target: object, *args: object) -> fx.Node:
        node = self.graph.call_function(target, args)  # type: ignore[arg-type]
        node.meta = {**self.product.meta, "val": self._value(node)}
        return node

    @staticmethod
    def _value(node: fx.Node) -> object:
        with torch.no_grad():
            return node.target(*fx.map_arg(node.args, lambda n: n.meta["val"]))  # type: ignore[operator]
