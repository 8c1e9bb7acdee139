"""Gradients are summed over the ranks that hold the same shard inside the backward, each layer's as it is ready."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from omnicompile.capture.classify import HEAVY, is_view
from omnicompile.passes.accumulate import is_kept
from omnicompile.passes.liveness import storage_of
from omnicompile.passes.rank_program import GROUP_PREFIX, ParamSpec

_c10d = torch.ops._c10d_functional
_WAIT = _c10d.wait_tensor.default
_SCATTERS = (_c10d.reduce_scatter_tensor.default, _c10d.reduce_scatter_tensor_coalesced.default)
_NUMBERED = re.compile(r"^(.*?\.\d+)(?=\.|$)")


def sum_over_replicas_pass(
    gm: fx.GraphModule, gradients: Sequence[str], params: Mapping[str, ParamSpec], groups: Mapping[str, str]
) -> set[str]:
    """Changes a step graph in place. Returns the placeholders whose gradients in the output are now complete.

    gradients: placeholders of the parameters whose gradients follow the loss in the output. groups: names of process
    groups by axes string, where they are bound.

    Before (a shard's gradient is still to be summed over `dp_replicate`):
        G2 = scatter(d2); ...; g2 = wait(G2); ...; g1 = wait(G1); return loss, g1, g2
    After:
        G2 = scatter(d2); ...; g2 = wait(G2); S2 = all_reduce_(g2); ...; g1 = wait(G1); S1 = all_reduce_(g1);
        return loss, wait(S1), wait(S2)

    - A layer's gradients are summed by one coalesced collective, launched when the last of them is there and no product
      or collective reads on before; all are waited for at the end of the step.
    - A gradient that is scattered first is waited for when the next one is launched, if that was to be later.
    - They are summed in place, in the memory that they are in: a gradient that shares it with anything is copied first.

    Safe: nothing but the output reads a gradient; every rank runs the same graph. Right only where these gradients are
    the whole sum over micro-steps: in the only micro-step, or the last after `accumulate_pass`. Runs after
    `overlap_pass`.
    """
    output = gm.graph.output_node()
    results = output.args[0]
    assert isinstance(results, tuple | list)
    _wait_early(gm.graph, [n for p, n in zip(gradients, results[1:]) if len(params[p].reduce_axes) == 1])
    index = {node: i for i, node in enumerate(gm.graph.nodes)}
    wanted: list[_Ready] = []
    summed: set[str] = set()
    for name, node in zip(gradients, results[1:]):
        if len(params[name].reduce_axes) == 1 and isinstance(node, fx.Node) and node.op == "call_function":
            summed.add(name)
            if all(node is not other for _, _, other in wanted):
                wanted.append((index[node], name, node))
    done: dict[fx.Node, fx.Node] = {}
    for bucket in _buckets(sorted(wanted, key=lambda item: item[0]), params):
        axes = params[bucket[0][1]].reduce_axes[0]
        _sum(gm.graph, [node for _, _, node in bucket], groups.get(axes, GROUP_PREFIX + axes), done)
    if wanted:
        output.args = (tuple(done[r] if n in summed else r for n, r in _named(results, gradients)),)
        gm.graph.lint()
        gm.recompile()
    return summed


def _wait_early(graph: fx.Graph, gradients: Sequence[fx.Node]) -> None:
    """Put what follows a scatter, up to its gradient, in front of the next scatter of a layer after it. It then has had
    a layer's backward to itself."""
    index = {node: i for i, node in enumerate(graph.nodes)}
    following: dict[fx.Node, fx.Node] = {}
    waiting: list[fx.Node] = []
    products = False
    for node in graph.nodes:
        products = products or node.target in HEAVY
        if node.target in _SCATTERS:
            if products:
                following |= dict.fromkeys(waiting, node)
                waiting = []
            waiting.append(node)
            products = False
    for gradient in gradients:
        chain = _since_scatter(gradient)
        if chain is None or (place := following.get(chain[0])) is None or index[place] > index[gradient]:
            continue
        for node in chain[1:]:
            if index[node] > index[place]:
                place.prepend(node)


def _since_scatter(gradient: fx.Node) -> list[fx.Node] | None:
    """The scatter that this gradient comes of, and what is done to its result alone, in order; None if there is none or
    something else reads it."""
    chain = [gradient]
    while chain[-1].target not in _SCATTERS:
        sources = [node for node in chain[-1].all_input_nodes if not is_kept(node)]
        node = chain[-1]
        alone = node is gradient or node.target is operator.getitem or len(node.users) == 1
        if node.op != "call_function" or len(sources) != 1 or not alone:
            return None
        chain.append(sources[0])
    return chain[::-1]


_Ready = tuple[int, str, fx.Node]


def _named(results: Sequence[fx.Node], gradients: Sequence[str]) -> list[tuple[str, fx.Node]]:
    names = ["", *gradients]
    return [(names[i] if i < len(names) else "", result) for i, result in enumerate(results)]


def _buckets(ready: Sequence[_Ready], params: Mapping[str, ParamSpec]) -> list[list[_Ready]]:
    """Neighbouring gradients of one layer, group and dtype."""
    buckets: dict[tuple[object, ...], list[_Ready]] = {}
    done: list[list[_Ready]] = []
    layer: str | None = None
    for item in ready:
        spec = params[item[1]]
        found = _NUMBERED.match(spec.name)
        here = found.group(1) if found else ""
        if here != layer:
            done += buckets.values()
            buckets, layer = {}, here
        value = item[2].meta["val"]
        buckets.setdefault((spec.reduce_axes, value.dtype), []).append(item)
    return [*done, *buckets.values()]


def _sum(graph: fx.Graph, nodes: list[fx.Node], group: str, done: dict[fx.Node, fx.Node]) -> None:
    """Launch the sum of `nodes` behind the last of them, and wait for it at the end."""
    place = nodes[-1]
    while not _cuts(place.next):
        place = place.next
    output = graph.output_node()
    with graph.inserting_after(place):
        own = [_own(graph, node) for node in nodes]
    last = next((node for node in own if node not in nodes), place)  # of nodes put behind `place`, the first is last
    with graph.inserting_after(last):
        call = graph.call_function(_c10d.all_reduce_coalesced_.default, (own, "sum", group))
    call.meta = {"val": [node.meta["val"] for node in own], "phase": "replica sum"}
    with graph.inserting_after(call):
        items = [graph.call_function(operator.getitem, (call, i)) for i in reversed(range(len(own)))][::-1]
    with graph.inserting_before(output):
        for node, item in zip(nodes, items):
            item.meta = {**node.meta, "phase": "replica sum"}
            wait = graph.call_function(_WAIT, (item,))
            wait.meta = dict(item.meta)
            done[node] = wait


def _cuts(node: fx.Node) -> bool:
    """Whether a launch in front of this node stands between kernels."""
    outside = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in ("aten", "prims")
    return node.op == "output" or node.target in HEAVY or outside


def _own(graph: fx.Graph, gradient: fx.Node) -> fx.Node:
    """The gradient in contiguous memory that it has for itself."""
    node, alone = gradient, True
    while alone and is_view(node):
        node = node.args[0]  # type: ignore[assignment]
        alone = len(node.users) == 1
    value = gradient.meta["val"]
    assert isinstance(value, Tensor)
    own = storage_of(gradient)
    if alone and len(gradient.users) == 1 and (own.op == "call_function" or is_kept(own)) and value.is_contiguous():
        return gradient
    copy = graph.call_function(torch.ops.aten.clone.default, (gradient,), {"memory_format": torch.contiguous_format})
    copy.meta = {**gradient.meta, "val": torch.empty_like(value, memory_format=torch.contiguous_format)}
    return copy
