"""Cut a step graph into regions of plain compute, and compile each distinct one once.

    a = mm(x, w); b = gelu(a); c = all_gather(b); d = wait(c); e = mm(d, v)
 -> (b,) = region_0(x, w); c = all_gather(b); d = wait(c); (e,) = region_1(d, v)

Collectives, anchors and what gives numbers stay in the outer graph, where they can be ordered across layers. Regions
of equal structure share one compiled function, and the layers of a kind have equal regions: the number of compilations
does not grow with depth. What is compiled for some rows does not serve none or one (torch.compile takes sizes 0 and 1
for constants): so small inputs run as they are, or a layer whose expert gets a single row would be compiled anew.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from omnicompile.lowering.compiled_region import FixedCall, FixedShapes, Function
from omnicompile.passes.dropout import KEYED

Compile = Callable[[fx.GraphModule, bool], Function | FixedShapes]
_UNBACKED = re.compile(r"\b[us]\d+\b")


@dataclass(frozen=True)
class Region:
    """A contiguous run of nodes; `inputs` are read from outside, `outputs` are read outside."""

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    @property
    def dynamic(self) -> bool:
        """Whether a shape in it depends on data (rows of an expert)."""
        return any(_symbolic(node) for node in (*self.nodes, *self.inputs))


def _values(node: fx.Node) -> list[Any]:
    value = node.meta.get("val")
    return list(value) if isinstance(value, tuple | list) else [value]


def _symbolic(node: fx.Node) -> bool:
    sizes = [size for v in _values(node) if isinstance(v, Tensor) for size in v.shape]
    return any(isinstance(size, torch.SymInt) for size in sizes)


def is_compute(node: fx.Node) -> bool:
    """An ATen operator, or one keyed by place, on tensors whose results are tensors."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target.namespace not in ("aten", "prims") and node.target not in KEYED:
        return False
    return all(isinstance(value, Tensor) for value in _values(node))


def find_regions(gm: fx.GraphModule) -> list[Region]:
    return [_region(run) for run in _runs(gm)]


def _runs(gm: fx.GraphModule) -> list[list[fx.Node]]:
    """Maximal runs of compute in the order of the graph; elements of a run's tuples belong to it."""
    runs: list[list[fx.Node]] = []
    run: list[fx.Node] = []
    members: set[fx.Node] = set()
    for node in gm.graph.nodes:
        of_run = node.target is operator.getitem and node.args[0] in members
        if is_compute(node) or of_run:
            run.append(node)
            members.add(node)
        elif node.op in ("call_function", "output"):
            runs.append(run)
            run, members = [], set()
    return [nodes for nodes in runs if any(_works(node) for node in nodes)]


def _works(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and not node.target.is_view


def _region(nodes: list[fx.Node]) -> Region:
    inside = set(nodes)
    inputs = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in inside)
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    return Region(tuple(nodes), tuple(inputs), tuple(outputs))


def structure(region: Region) -> str:
    """A text that is equal for regions that compute the same of inputs of the same shapes."""
    number = {node: f"i{i}" for i, node in enumerate(region.inputs)}
    number |= {node: f"n{i}" for i, node in enumerate(region.nodes)}
    lines = [f"{[_layout(v) for v in _values(node)]}" for node in region.inputs]
    for node in region.nodes:
        args = fx.map_arg((node.args, node.kwargs), lambda n: _Name(number[n]))
        lines.append(f"{node.target} {args}")
    lines.append(" ".join(number[node] for node in region.outputs))
    return _without_symbol_names("\n".join(lines))


class _Name(str):
    __slots__ = ()


def _layout(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype}{tuple(value.shape)}{value.stride()}"
    return type(value).__name__


def _without_symbol_names(text: str) -> str:
    """Symbols of sizes are numbered anew for each region: only which are equal counts."""
    names: dict[str, str] = {}
    return _UNBACKED.sub(lambda found: names.setdefault(found.group(), f"size{len(names)}"), text)


def as_module(region: Region) -> fx.GraphModule:
    """The region as a module: `module(*inputs)` gives the list of outputs."""
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(region.inputs):
        made[node] = graph.placeholder(f"i{i}")
        made[node].meta = dict(node.meta)
    for node in region.nodes:
        made[node] = graph.node_copy(node, lambda n: made[n])
    graph.output([made[node] for node in region.outputs])
    return fx.GraphModule(torch.nn.Module(), graph)


def compile_regions(gm: fx.GraphModule, compile: Compile) -> tuple[fx.GraphModule, int]:
    """Replace every region of `gm`, in place, by a call of what `compile(module, dynamic)` makes of it. Returns the
    graph and the number of distinct regions."""
    _elements_beside_tuples(gm)
    distinct: dict[str, nn.Module | FixedShapes] = {}
    calls: Counter[str] = Counter()
    for run in _runs(gm):
        region = _region(run)
        key = structure(region)
        if key not in distinct:
            distinct[key] = _compiled(region, compile)
        name, made = f"region_{list(distinct).index(key)}", distinct[key]
        if isinstance(made, FixedShapes):
            calls[name] += 1
            name, made = f"{name}_call_{calls[name]}", FixedCall(made)
        gm.add_submodule(name, made)
        _call(gm, region, name)
    gm.graph.lint()
    gm.recompile()
    return gm, len(distinct)


def _elements_beside_tuples(gm: fx.GraphModule) -> None:
    """Elements of a tuple are taken where it is made, so that what regions give are tensors."""
    for node in reversed(gm.graph.find_nodes(op="call_function", target=operator.getitem)):
        source = node.args[0]
        if isinstance(source, fx.Node) and is_compute(source):
            source.append(node)


def _compiled(region: Region, compile: Compile) -> nn.Module | FixedShapes:
    module = as_module(region)
    sizes = sizes_of_data(region)
    made = compile(module, region.dynamic)
    if isinstance(made, FixedShapes):
        return made
    return _Compiled(made, module if sizes else None, sizes)


def sizes_of_data(region: Region) -> tuple[tuple[int, int | None], ...]:
    """Sizes that depend on data: (index of the input, dimension), or (index, None) where the input is the number."""
    found: list[tuple[int, int | None]] = []
    for index, node in enumerate(region.inputs):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            found.append((index, None))
        elif isinstance(value, Tensor):
            found += [(index, dim) for dim, size in enumerate(value.shape) if isinstance(size, torch.SymInt)]
    return tuple(found)


class _Compiled(nn.Module):
    """A region's function. plain: runs instead where one of `sizes` is 0 or 1."""

    def __init__(self, function: Function, plain: Function | None, sizes: tuple[tuple[int, int | None], ...]) -> None:
        super().__init__()
        self._function, self._plain, self._sizes = function, plain, sizes

    def forward(self, *inputs: Any) -> Any:
        if self._plain is not None and any(_size(inputs, at) < 2 for at in self._sizes):
            return self._plain(*inputs)
        return self._function(*inputs)


def _size(inputs: tuple[Any, ...], at: tuple[int, int | None]) -> int:
    index, dim = at
    return int(inputs[index] if dim is None else inputs[index].shape[dim])


def _call(gm: fx.GraphModule, region: Region, name: str) -> None:
    with gm.graph.inserting_after(region.nodes[-1]):
        call = gm.graph.call_module(name, region.inputs)
    with gm.graph.inserting_after(call):
        for index, node in reversed(list(enumerate(region.outputs))):
            item = gm.graph.call_function(operator.getitem, (call, index))
            item.meta = dict(node.meta)
            node.replace_all_uses_with(item, delete_user_cb=lambda user, inside=set(region.nodes): user not in inside)
    for node in reversed(region.nodes):
        gm.graph.erase_node(node)
