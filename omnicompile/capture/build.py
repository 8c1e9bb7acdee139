"""Assemble a Program from a traced forward."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import sympy
from torch import Tensor, fx, nn

from omnicompile.anchors import experts as _experts  # noqa: F401  (defines the operators named below)
from omnicompile.capture.annotate import Annotator, largest_product
from omnicompile.capture.cleanup import clean
from omnicompile.capture.fusion import fuse
from omnicompile.capture.joint import JointGraph, needs_gradient, trace_joint
from omnicompile.capture.liveness import analyse
from omnicompile.capture.regions import Region, Regions, find_regions, is_repeat, region_places
from omnicompile.capture.repeats import LayerKind, Repeats
from omnicompile.capture.symbols import GenericSize, SizeReader
from omnicompile.capture.trace import TracedForward
from omnicompile.program import (
    BackwardPoint,
    Block,
    Edge,
    Expr,
    Param,
    Program,
    Recompute,
    Run,
    SampleShape,
    Saved,
    Segment,
    Sym,
)
from omnicompile.torch_compat import FakeTensorMode

ZERO = sympy.Integer(0)
_EXPERT_WEIGHTS = frozenset({"omnicompile.grouped_mm.default", "omnicompile.expert_bias.default"})


@dataclass
class _Names:
    """Parameter names: `canonical` maps every name to the first one that shares its storage. untrained: those of
    parameters that the model says require no gradient."""

    shapes: dict[str, tuple[int, ...]]
    canonical: dict[str, str]
    untrained: frozenset[str]

    @staticmethod
    def of(model: nn.Module) -> _Names:
        first: dict[int, str] = {}
        shapes, canonical = {}, {}
        for name, param in model.named_parameters(remove_duplicate=False):
            shapes[name] = tuple(param.shape)
            canonical[name] = first.setdefault(id(param), name)
        every = model.named_parameters(remove_duplicate=False)
        return _Names(shapes, canonical, frozenset(name for name, param in every if not param.requires_grad))


def build_program(
    model: nn.Module,
    traced: TracedForward,
    sizes: list[GenericSize],
    sample: SampleShape,
    name: str,
    source: str,
    progress: Callable[[str], None] = lambda _: None,
) -> Program:
    """Cut, trace backward, annotate."""
    clean(traced.graph)
    regions = find_regions(traced)
    names = _Names.of(model)
    # Leading dimensions of inputs are workload sizes; what parameters are made of is the model's.
    reader = SizeReader(sizes, {d for shape in names.shapes.values() for d in shape})
    mode = _fake_mode(traced)
    differentiable = needs_gradient(traced, names.untrained)
    claimed: dict[str, str] = {}
    segments: list[Segment] = []
    for region in regions.regions:
        progress(f"pricing {region.name}")
        joint = trace_joint(traced, region, differentiable, mode)
        params = _params(region, joint, traced.repeats, names, claimed)
        segments.append(_segment(region, joint, reader, traced, params))
    segments += _idle(names, claimed, regions)
    blocks = _blocks(regions, segments)
    return Program(
        name=name,
        source=source,
        blocks=blocks,
        segments=tuple(segments),
        runs=_runs(regions, traced.repeats),
        edges=_edges(regions, reader),
        sample=sample,
        dtype=_dtype(model),
    )


def _fake_mode(traced: TracedForward) -> FakeTensorMode:
    for node in traced.graph.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, Tensor) and node.name in traced.params:
            return value.fake_mode  # type: ignore[attr-defined, no-any-return]
    raise ValueError("the traced model has no parameters")


def _dtype(model: nn.Module) -> str:
    floats = [p.dtype for p in model.parameters() if p.is_floating_point()]
    return str(max(set(floats), key=floats.count)).removeprefix("torch.") if floats else "float32"


def _segment(
    region: Region, joint: JointGraph, reader: SizeReader, traced: TracedForward, params: tuple[Param, ...]
) -> Segment:
    module = region.kind.path if region.kind is not None else ""
    annotator = Annotator(joint, reader, module)
    fused = {node: group[-1].name for group in fuse(joint.forward) for node in group}
    inputs = joint.differentiable - set(joint.params)
    paths: tuple[str, ...] = ("",)
    count = 1
    if region.kind is not None:
        paths = tuple(dict.fromkeys(instance_paths(region.kind, traced.repeats)))
        count = traced.repeats.executions(region.kind.index)
    live = analyse(joint, reader, fused, _shared(region, joint, count), _expert_params(joint))
    return Segment(
        name=region.name,
        block=region.block,
        role=region.role,
        count=count,
        paths=paths,
        params=params,
        ops=annotator.ops(),
        saved=live.saved,
        input_bytes=sum((reader.nbytes(n.meta["val"]) for n in joint.activations if n in inputs), ZERO),
        output_bytes=sum((reader.nbytes(n.meta["val"]) for n in joint.outputs if isinstance(n, fx.Node)), ZERO),
        forward_peak=live.forward_peak,
        backward=live.backward,
        logits=_logits(region, joint, reader),
    )


def _shared(region: Region, joint: JointGraph, count: int) -> dict[fx.Node, int]:
    """Values flowing into a layer that its repeats read as well, such as an encoder's output: -> number of layers."""
    if region.kind is None or count == 1:
        return {}
    kind = region.kind.index

    def repeats(user: fx.Node) -> bool:
        return is_repeat(user) and user.op == "call_function" and len(user.args) > 2 and user.args[2] == kind

    return {inner: count for inner, outer in joint.outer.items() if any(repeats(u) for u in outer.users)}


def _logits(region: Region, joint: JointGraph, reader: SizeReader) -> tuple[Expr, int] | None:
    """(tokens, vocabulary) where a head ends in a product over the tokens."""
    if region.role != "head" or (product := largest_product(joint)) is None:
        return None
    shape = product.meta["val"].shape
    tokens = reader.numel(shape[:-1])
    return (tokens, int(shape[-1])) if tokens.free_symbols & {Sym.S} else None


def instance_paths(kind: LayerKind, repeats: Repeats) -> list[str]:
    """Module paths of all instances of a kind, those inside repeated outer layers written out."""
    found = []
    for call in repeats.calls:
        if call.kind != kind.index:
            continue
        if call.parent is None:
            found.append(call.path)
            continue
        outer = repeats.kinds[call.parent]
        for path in instance_paths(outer, repeats):
            found.append(path + call.path.removeprefix(outer.path))
    return found


def _params(
    region: Region, joint: JointGraph, repeats: Repeats, names: _Names, claimed: dict[str, str]
) -> tuple[Param, ...]:
    """The parameters of one instance. A layer owns all under its path but those of layers inside it."""
    expert = _expert_params(joint)
    if region.kind is None:
        own = list(dict.fromkeys(joint.params.values()))
    else:
        inner = [k.path + "." for k in repeats.kinds if k.path.startswith(region.kind.path + ".")]
        inner = [p for kind in repeats.kinds for p in _siblings(kind, region.kind)] + inner
        prefix = region.kind.path + "."
        own = [n for n in names.shapes if n.startswith(prefix) and not any(n.startswith(i) for i in inner)]
    result = []
    for name in own:
        shared = names.canonical[name]
        tied = shared if claimed.setdefault(shared, region.name) != region.name or shared != name else ""
        tied = tied if (tied and tied != name) or claimed[shared] != region.name else ""
        trained = name not in names.untrained
        result.append(Param(name, names.shapes[name], expert=name in expert, tied_to=tied, trained=trained))
    if region.kind is not None:
        for path in instance_paths(region.kind, repeats):
            for name in own:
                claimed.setdefault(names.canonical[path + name.removeprefix(region.kind.path)], region.name)
    return tuple(result)


def _siblings(inner: LayerKind, outer: LayerKind) -> list[str]:
    """Prefixes of all instances of a layer kind that lie inside the traced instance of `outer`."""
    return [p + "." for p in inner.paths if p.startswith(outer.path + ".")]


def _expert_params(joint: JointGraph) -> set[str]:
    """Parameters that an expert operator reads by expert."""
    found = set()
    for node in joint.forward:
        if str(node.target) in _EXPERT_WEIGHTS:
            found |= {joint.params[a] for a in node.all_input_nodes if a in joint.params}
    return found


def _idle(names: _Names, claimed: dict[str, str], regions: Regions) -> list[Segment]:
    """Parameters that the loss does not depend on: stored, never computed with."""
    unused = [n for n in names.shapes if names.canonical[n] == n and n not in claimed]
    if not unused:
        return []
    block = regions.blocks[-1]
    params = tuple(Param(n, names.shapes[n], trained=n not in names.untrained) for n in unused)
    return [
        Segment(
            name=f"{block}.idle",
            block=block,
            role="idle",
            count=1,
            paths=("",),
            params=params,
            ops=(),
            saved={policy: Saved(ZERO, ZERO) for policy in Recompute},
            input_bytes=ZERO,
            output_bytes=ZERO,
            forward_peak=ZERO,
            backward=(BackwardPoint(ZERO, ZERO),),
        )
    ]


def _blocks(regions: Regions, segments: list[Segment]) -> tuple[Block, ...]:
    """Blocks in order of dataflow. The one that holds the loss is the backbone."""
    result = []
    for name in regions.blocks:
        own = [s for s in segments if s.block == name]
        kind = "backbone" if any(s.role == "head" for s in own) else "encoder"
        path = _common_path([p for s in own for p in s.paths if p])
        symbols = set().union(*(op.flops.free_symbols for s in own for op in s.ops)) if own else set()
        units = "I" if symbols & {Sym.N, Sym.I, Sym.N2} else "C" if symbols & {Sym.A, Sym.C, Sym.A2} else ""
        result.append(Block(name, kind, path, tuple(s.name for s in own), "" if kind == "backbone" else units))
    return tuple(result)


def _common_path(paths: list[str]) -> str:
    parts = [p.split(".") for p in paths]
    common = []
    for level in zip(*parts):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)


def _runs(regions: Regions, repeats: Repeats) -> tuple[Run, ...]:
    """Executions in order, equal neighbours merged. Layers inside layers come before the rest of the outer one."""
    names = {r.kind.index: r.name for r in regions.regions if r.kind is not None}
    nodes = list(next(iter(regions.of_node)).graph.nodes)
    place = region_places(regions.regions, nodes, regions.of_node)
    started = {str(n.args[1]): i for i, n in enumerate(nodes) if is_repeat(n) and n.target is not operator.getitem}
    started |= {r.kind.path: int(place[r.name]) for r in regions.regions if r.kind is not None}

    def expand(kind: int) -> list[str]:
        inner = [name for call in repeats.calls if call.parent == kind for name in expand(call.kind)]
        return inner + ([names[kind]] if kind in names else [])

    events = [(place[r.name], [r.name]) for r in regions.regions if r.kind is None]
    now = 0
    for call in repeats.calls:
        if call.parent is None:
            # A traced layer all of whose work is done by layers inside it has no node of its own.
            now = started.get(call.path, now)
            events.append((now, expand(call.kind)))
    runs: list[Run] = []
    for name in (name for _, executed in sorted(events, key=lambda e: e[0]) for name in executed):
        if runs and runs[-1].segment == name:
            runs[-1] = Run(name, runs[-1].count + 1)
        else:
            runs.append(Run(name, 1))
    return tuple(runs)


def _edges(regions: Regions, reader: SizeReader) -> tuple[Edge, ...]:
    """Tensors that cross between blocks, summed by pair of blocks."""
    total: dict[tuple[str, str], Expr] = {}
    for node, region in regions.of_node.items():
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        targets = {regions.of_node[u].block for u in node.users if u in regions.of_node} - {region.block}
        for target in targets:
            pair = (region.block, target)
            total[pair] = total.get(pair, ZERO) + reader.nbytes(value)
    return tuple(Edge(a, b, nbytes) for (a, b), nbytes in total.items())


def replace_source(program: Program, values: Mapping[str, object]) -> Program:
    """A copy with other fields."""
    from dataclasses import replace

    return replace(program, **values)  # type: ignore[arg-type]
