"""Forward and backward of one segment as one graph of ATen operators on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from omnicompile.anchors import markers as _markers  # noqa: F401  (defines the operator)
from omnicompile.capture.regions import Region
from omnicompile.capture.trace import TracedForward
from omnicompile.torch_compat import FakeTensorMode

aten = torch.ops.aten


@dataclass
class SegmentGraph:
    """The forward of a region on its own. inputs / outputs: nodes of the whole graph that cross its border."""

    module: fx.GraphModule
    inputs: list[fx.Node]
    outputs: list[fx.Node]


@dataclass
class JointGraph:
    """Forward and backward of a region.

    forward / backward: calls in order. params: placeholder -> parameter name. activations: placeholders of values that
    flow in from other regions (with `differentiable` those that need a gradient). outputs: forward results that flow
    out. weight_grads / input_grads: the backward's results. constants: the real tensors behind placeholders that the
    trace burnt in (segment boundaries, indices). outer: placeholder -> node of the whole graph.
    """

    graph: fx.Graph
    forward: list[fx.Node]
    backward: list[fx.Node]
    params: dict[fx.Node, str]
    activations: list[fx.Node]
    differentiable: set[fx.Node]
    tangents: list[fx.Node]
    outputs: list[fx.Node]
    weight_grads: dict[str, fx.Node]
    input_grads: list[fx.Node]
    constants: dict[fx.Node, Tensor] = field(default_factory=dict)
    outer: dict[fx.Node, fx.Node] = field(default_factory=dict)


def needs_gradient(traced: TracedForward, untrained: Collection[str] = ()) -> set[fx.Node]:
    """Parameters that are trained, and results that depend on any parameter through floating-point operators.

    A result of parameters in `untrained` alone is among them: layers of one kind are traced once, the first of them may
    read such a result and the next ones not. Whether its gradient is needed is for the price to say.
    """
    found: set[fx.Node] = set()
    for node in traced.graph.graph.nodes:
        if node.op == "placeholder":
            if node.name in traced.params:
                found.add(node)
        elif node.op == "call_function" and node.target is not aten.detach.default:
            value = node.meta.get("val")
            parts = value if isinstance(value, tuple | list) else (value,)
            floats = any(isinstance(v, Tensor) and v.is_floating_point() for v in parts)
            if floats and any(i in found for i in node.all_input_nodes):
                found.add(node)
    return {node for node in found if traced.params.get(node.name) not in untrained}


def extract(region: Region) -> SegmentGraph:
    """Copy a region's nodes into a graph of their own."""
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    inside = set(region.nodes)
    inputs: list[fx.Node] = []
    for node in region.nodes:
        for value in node.all_input_nodes:
            if value not in inside and value not in env:
                env[value] = graph.placeholder(value.name)
                inputs.append(value)
    for node in region.nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
    outputs = [n for n in region.nodes if any(u not in inside for u in n.users)]
    outputs = [n for n in outputs if isinstance(n.meta.get("val"), Tensor)]
    graph.output(tuple(env[n] for n in outputs))
    return SegmentGraph(fx.GraphModule({}, graph), inputs, outputs)


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
    """Plain scaled_dot_product_attention without a mask is the attention anchor; with one it stays as it is."""
    names = ("attn_mask", "dropout_p", "is_causal")
    options = {**dict(zip(names, rest)), **kwargs}
    if options.get("attn_mask") is not None or options.get("dropout_p") or query.dim() != 4:
        return aten.scaled_dot_product_attention.default(query, key, value, *rest, **kwargs)
    scale = options.get("scale") or query.shape[-1] ** -0.5
    causal = bool(options.get("is_causal", False))
    out, _ = torch.ops.omnicompile.attention(query, key, value, None, None, None, 0, 0, causal, scale, 0, 0.0)
    return out


def _copied(into: Tensor, source: Tensor, *_: Any) -> Tensor:
    """What functionalization makes of `into.copy_(source)`, by operators that have a derivative."""
    return source.to(into.dtype).expand(into.shape)


class _Interpreter(fx.Interpreter):
    """Runs a segment, plain attention as the anchor and copies by operators that have a derivative."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is aten.scaled_dot_product_attention.default:
            return _fused_attention(*args, **kwargs)
        if target is aten.copy.default:
            return _copied(*args)
        return super().call_function(target, args, kwargs)


def _fresh(mode: FakeTensorMode, value: Any, requires_grad: bool) -> Any:
    """A new leaf of the same shape, strides and type."""
    if not isinstance(value, Tensor):
        return value
    with mode:
        new = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
    return new.requires_grad_(requires_grad)


def trace_joint(
    traced: TracedForward, region: Region, differentiable: set[fx.Node], mode: FakeTensorMode
) -> JointGraph:
    """Trace the forward and backward of a region. `differentiable`: from `needs_gradient`."""
    segment = extract(region)
    values, trained = [], []
    for node in segment.inputs:
        value = node.meta.get("val")
        grad = node in differentiable and isinstance(value, Tensor) and value.is_floating_point()
        if node.name in traced.constants:
            value = traced.constants[node.name]
        values.append(
            value if isinstance(value, Tensor) and node.name in traced.constants else _fresh(mode, value, grad)
        )
        trained.append(grad)
    out_grad = [n in differentiable and n.meta["val"].is_floating_point() for n in segment.outputs]
    tangents = [_fresh(mode, n.meta["val"], False) for n, g in zip(segment.outputs, out_grad) if g]
    wanted = [i for i, grad in enumerate(trained) if grad]
    joint = make_fx(_joint_function(segment, out_grad, wanted, len(values)), pre_dispatch=False)
    with mode:
        module = joint(*values, *tangents)
    return _split(module.graph, traced, segment, out_grad, wanted, len(values))


def _joint_function(segment: SegmentGraph, out_grad: list[bool], wanted: list[int], count: int) -> Callable[..., Any]:
    def joint(*flat: Any) -> Any:
        values, tangents = list(flat[:count]), list(flat[count:])
        with torch.enable_grad():
            outputs = _Interpreter(segment.module).run(*values)
            scored = [o for o, g in zip(outputs, out_grad) if g and o.requires_grad]
            kept = [t for t, o in zip(tangents, [o for o, g in zip(outputs, out_grad) if g]) if o.requires_grad]
        marked = [torch.ops.omnicompile.backward_starts(o.detach()) if isinstance(o, Tensor) else o for o in outputs]
        grads: list[Tensor | None] = [None] * len(wanted)
        if scored and wanted:
            grads = list(torch.autograd.grad(scored, [values[i] for i in wanted], kept, allow_unused=True))
        return marked, grads

    return joint


def _split(
    graph: fx.Graph, traced: TracedForward, segment: SegmentGraph, out_grad: list[bool], wanted: list[int], count: int
) -> JointGraph:
    placeholders = graph.find_nodes(op="placeholder")
    calls = [n for n in graph.nodes if n.op == "call_function"]
    marks = [i for i, n in enumerate(calls) if n.target is torch.ops.omnicompile.backward_starts.default]
    border = marks[0] if marks else len(calls)
    forward = [n for n in calls[:border] if n.target is not aten.detach.default or n.users]
    backward = calls[marks[-1] + 1 :] if marks else []
    result = next(n for n in graph.nodes if n.op == "output").args[0]
    grads = list(result[1])
    params, weight_grads, input_grads, constants = {}, {}, [], {}
    for position, (node, outer) in enumerate(zip(placeholders, segment.inputs)):
        if outer.name in traced.params:
            params[node] = traced.params[outer.name]
        if outer.name in traced.constants:
            constants[node] = traced.constants[outer.name]
        if position in wanted and (grad := grads[wanted.index(position)]) is not None:
            if node in params:
                weight_grads[params[node]] = grad
            else:
                input_grads.append(grad)
    activations = [n for n in placeholders[:count] if n not in params]
    return JointGraph(
        graph=graph,
        forward=forward,
        backward=backward,
        params=params,
        activations=activations,
        differentiable={placeholders[i] for i in wanted},
        tangents=placeholders[count:],
        outputs=[calls[i].args[0] for i in marks],
        weight_grads=weight_grads,
        input_grads=input_grads,
        constants=constants,
        outer=dict(zip(placeholders, segment.inputs)),
    )
