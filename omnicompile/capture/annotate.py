"""Price-relevant facts of every kernel of a joint graph: kind, FLOPs and bytes as expressions."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from omnicompile.capture.classify import ATTENTION, CONVOLUTIONS, GROUPED, MATMULS, is_free, storage_of
from omnicompile.capture.fusion import fuse, group_traffic
from omnicompile.capture.joint import JointGraph
from omnicompile.capture.pairs import attention_pairs
from omnicompile.capture.regions import node_path
from omnicompile.capture.symbols import SizeReader
from omnicompile.cost_model.flops import attention_flops, conv_flops, gemm_flops
from omnicompile.program import AttentionShape, ExpertsShape, Expr, GemmShape, Op, OpKind, Phase

aten = torch.ops.aten
omni = torch.ops.omnicompile
ZERO = sympy.Integer(0)


@dataclass
class Annotator:
    """Turns the calls of one joint graph into Ops. `module`: path that the ops are reported under."""

    joint: JointGraph
    reader: SizeReader
    module: str

    def ops(self) -> tuple[Op, ...]:
        feeds = gradient_feeds(self.joint)
        result = [self._op(g, Phase.FORWARD, frozenset()) for g in fuse(self.joint.forward)]
        for group in fuse(self.joint.backward):
            needed = frozenset().union(*(feeds.get(n, frozenset()) for n in group))
            if needed:
                result.append(self._op(group, Phase.BACKWARD, needed))
        return tuple(result)

    def _op(self, group: list[fx.Node], phase: Phase, feeds: frozenset[str]) -> Op:
        node = group[0]
        if node.target in MATMULS:
            return self._matmul(node, phase, feeds)
        if node.target in CONVOLUTIONS:
            return self._convolution(node, phase, feeds)
        if node.target in ATTENTION:
            return self._attention(node, phase, feeds)
        if node.target in GROUPED:
            return self._grouped(node, phase, feeds)
        return self._memory(group, phase, feeds)

    def _make(self, node: fx.Node, kind: OpKind, phase: Phase, feeds: frozenset[str], flops: Expr, **extra: Any) -> Op:
        activation, param = extra.pop("traffic", None) or self._traffic([node])
        return Op(
            name=node.name,
            target=str(node.target),
            kind=kind,
            phase=phase,
            module=self.module,
            flops=flops,
            activation_bytes=activation,
            param_bytes=param,
            feeds=feeds,
            dtype=_dtype(node),
            **extra,
        )

    def _traffic(self, group: list[fx.Node]) -> tuple[Expr, Expr]:
        """(activation bytes, parameter bytes) that a kernel moves."""
        read, written = group_traffic(group)
        activation, param = ZERO, ZERO
        for node in (*read, *(part for result in written for part in _parts(result))):
            nbytes = self.reader.nbytes(node.meta.get("val"))
            if node in self.joint.params or node in self._weight_grads:
                param += nbytes
            else:
                activation += nbytes
        return activation, param

    @cached_property
    def _weight_grads(self) -> set[fx.Node]:
        return {storage_of(g) for g in self.joint.weight_grads.values()}

    def _memory(self, group: list[fx.Node], phase: Phase, feeds: frozenset[str]) -> Op:
        node = group[-1]
        traffic = self._traffic(group)
        if node.target is aten.embedding.default:
            # Only the rows that are looked up are read.
            traffic = (2 * self.reader.nbytes(node.meta["val"]), ZERO)
        return self._make(node, OpKind.MEMORY, phase, feeds, ZERO, traffic=traffic)

    def _matmul(self, node: fx.Node, phase: Phase, feeds: frozenset[str]) -> Op:
        left, right = [a for a in node.args if isinstance(a, fx.Node)][-2:]
        a, b = left.meta["val"].shape, right.meta["val"].shape
        dim = self.reader.dim
        transposed = node.target is aten.linear.default
        batch = self.reader.numel(a[:-2]) if len(a) > 2 and not transposed else sympy.Integer(1)
        m = self.reader.numel(a[:-1]) if transposed else dim(a[-2])
        n, k = dim(b[-2] if transposed else b[-1]), dim(a[-1])
        gemm, token_dim = _oriented(GemmShape(m, n, k, batch))
        flops = gemm_flops(m, n, k, batch)
        return self._make(node, OpKind.GEMM, phase, feeds, flops, gemm=gemm, token_dim=token_dim)

    def _convolution(self, node: fx.Node, phase: Phase, feeds: frozenset[str]) -> Op:
        backward = node.target is aten.convolution_backward.default
        out, x, w = node.args[:3] if backward else (node, *node.args[:2])
        assert isinstance(out, fx.Node) and isinstance(x, fx.Node) and isinstance(w, fx.Node)
        out_shape, x_shape, w_shape = (v.meta["val"].shape for v in (out, x, w))
        groups = int(node.args[9 if backward else 8])  # type: ignore[call-overload]
        once = conv_flops(self.reader.numel(out_shape), x_shape[1], groups, w_shape[2:])
        passes = sum(bool(p) for p in node.args[10][:2]) if backward else 1  # type: ignore[index]
        taps = int(torch.Size(w_shape[1:]).numel())
        rows = self.reader.numel([out_shape[0], *out_shape[2:]])
        gemm = GemmShape(rows, sympy.Integer(out_shape[1]), sympy.Integer(taps), sympy.Integer(max(passes, 1)))
        return self._make(node, OpKind.GEMM, phase, feeds, once * passes, gemm=gemm)

    def _attention(self, node: fx.Node, phase: Phase, feeds: frozenset[str]) -> Op:
        backward = node.target is omni.attention_backward.default
        shape = self._attention_shape(node, 1 if backward else 0, 6 if backward else 3)
        flops = attention_flops(shape.pairs, shape.heads, shape.head_dim, shape.v_head_dim, backward)
        return self._make(node, OpKind.ATTENTION, phase, feeds, flops, attention=shape)

    def _attention_shape(self, node: fx.Node, first: int, cu_at: int) -> AttentionShape:
        q, k, v = (node.args[first + i] for i in range(3))
        assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)
        qs, ks, vs = (t.meta["val"].shape for t in (q, k, v))
        causal, window = bool(node.args[cu_at + 5]), int(node.args[cu_at + 7])  # type: ignore[call-overload]
        bounds = tuple(self._constant(node.args[cu_at + i]) for i in range(2))
        return AttentionShape(
            heads=qs[1],
            kv_heads=ks[1],
            head_dim=qs[3],
            v_head_dim=vs[3],
            q_tokens=self.reader.numel((qs[0], qs[2])),
            kv_tokens=self.reader.numel((ks[0], ks[2])),
            pairs=attention_pairs(self.reader, qs, ks, bounds, window),
            causal=causal,
        )

    def _constant(self, value: Any) -> Tensor | None:
        """The real tensor behind a burnt-in constant of the trace."""
        if not isinstance(value, fx.Node):
            return None
        base = storage_of(value)
        if base.op == "get_attr":
            found = _attribute(self.joint.graph.owning_module, str(base.target))
            return found if type(found) is Tensor else None
        return self.joint.constants.get(base)

    def _grouped(self, node: fx.Node, phase: Phase, feeds: frozenset[str]) -> Op:
        weight_grad = node.target is omni.grouped_mm_weight.default
        left, right = node.args[0], node.args[1]
        assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
        rows, width = left.meta["val"].shape
        out = node.meta["val"].shape
        row_expr = self.reader.dim(rows)
        if weight_grad:
            gemm = GemmShape(sympy.Integer(out[1]), sympy.Integer(out[2]), row_expr)
            flops, token_dim = gemm_flops(row_expr, out[1], out[2]), "k"
        else:
            gemm = GemmShape(row_expr, sympy.Integer(out[1]), sympy.Integer(width))
            flops, token_dim = gemm_flops(row_expr, out[1], width), "m"
        return self._make(
            node, OpKind.GROUPED_GEMM, phase, feeds, flops, gemm=gemm, token_dim=token_dim, experts=self._experts()
        )

    def _experts(self) -> ExpertsShape:
        """The routed layer that this segment holds (its first, should it hold several)."""
        dispatch = next((n for n in self.joint.forward if n.target is omni.expert_dispatch.default), None)
        if dispatch is None:
            return self._sorted_experts()
        combine_input = next(n for n in self.joint.forward if n.target is omni.expert_combine.default)
        index = dispatch.args[1]
        assert isinstance(index, fx.Node) and isinstance(dispatch.args[0], fx.Node)
        products = [n for n in self.joint.forward if n.target is omni.grouped_mm.default]
        down = products[-1].args[0]
        assert isinstance(down, fx.Node) and combine_input is not None
        tokens, hidden = dispatch.args[0].meta["val"].shape
        return ExpertsShape(
            experts=int(dispatch.args[2]),  # type: ignore[call-overload]
            top_k=index.meta["val"].shape[1],
            hidden=hidden,
            intermediate=down.meta["val"].shape[1],
            tokens=self.reader.dim(tokens),
        )

    def _sorted_experts(self) -> ExpertsShape:
        """Of a model that sorts its tokens by expert itself: each token as often as its rows outnumber the tokens."""
        products = [n for n in self.joint.forward if n.target is omni.grouped_mm.default]
        (first, weight), last = products[0].args[:2], products[-1].args[0]
        assert isinstance(first, fx.Node) and isinstance(weight, fx.Node) and isinstance(last, fx.Node)
        rows = self.reader.dim(first.meta["val"].shape[0])
        top_k = max(1, int(rows.as_coeff_Mul()[0]))
        return ExpertsShape(
            experts=weight.meta["val"].shape[0],
            top_k=top_k,
            hidden=first.meta["val"].shape[1],
            intermediate=last.meta["val"].shape[1],
            tokens=rows / top_k,
        )


def _parts(node: fx.Node) -> list[fx.Node]:
    """The tensors that a call returns, as nodes: itself, or the elements that are taken of its tuple."""
    elements = [u for u in node.users if u.target is operator.getitem]
    return elements if isinstance(node.meta.get("val"), tuple | list) else [node]


def _attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module


def _dtype(node: fx.Node) -> str:
    value = node.meta.get("val")
    first = value[0] if isinstance(value, tuple | list) else value
    return str(first.dtype).removeprefix("torch.") if isinstance(first, Tensor) else "bfloat16"


def _oriented(shape: GemmShape) -> tuple[GemmShape, str]:
    """Put the dimension that tokens run along first; name the one that shrinks when tokens are split."""
    if shape.m.free_symbols:
        return shape, "m"
    if shape.n.free_symbols:
        return GemmShape(shape.n, shape.m, shape.k, shape.batch), "m"
    if shape.k.free_symbols:
        return shape, "k"
    if shape.batch.free_symbols:
        # Many small products, one per image: they run along with the images.
        each, times = shape.batch.as_independent(*shape.batch.free_symbols, as_Add=False)
        return GemmShape(shape.m * times, shape.n, shape.k, each), "m"
    return shape, ""


def gradient_feeds(joint: JointGraph) -> dict[fx.Node, frozenset[str]]:
    """For each backward call, which gradients depend on it: "weight", "input" or both."""
    inside = set(joint.backward)
    feeds: dict[fx.Node, set[str]] = {}
    for label, results in (("weight", joint.weight_grads.values()), ("input", joint.input_grads)):
        stack = [r for r in results if r in inside]
        seen: set[fx.Node] = set()
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            feeds.setdefault(node, set()).add(label)
            stack.extend(i for i in node.all_input_nodes if i in inside)
    return {node: frozenset(labels) for node, labels in feeds.items()}


def largest_product(joint: JointGraph) -> fx.Node | None:
    """The forward matrix product with the largest result: in a head, the logits."""
    products = [n for n in joint.forward if n.target in MATMULS and not is_free(n)]
    return max(products, key=lambda n: n.meta["val"].numel(), default=None)


def op_module(nodes: list[fx.Node]) -> str:
    """The module path that most of a region's nodes share."""
    paths = [node_path(n) for n in nodes]
    return max(set(paths), key=paths.count) if paths else ""
