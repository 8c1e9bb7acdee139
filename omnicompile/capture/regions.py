"""Cut a traced forward into segments and modality blocks, by module tree and dataflow.

Which modality a node belongs to follows from the inputs it depends on: what depends on pixels alone is the vision
encoder, what depends on audio features alone is the audio encoder, what depends on text (and on anything else) is the
backbone. No module is recognised by its name.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch import fx

from omnicompile.capture.repeats import LayerKind
from omnicompile.capture.trace import TracedForward

# Substrings of the names of forward arguments, which are conventions of processors, to the modality they carry.
_MODALITY_OF_INPUT = (
    ("video", "video"),
    ("pixel", "vision"),
    ("image", "vision"),
    ("input_features", "audio"),
    ("input_values", "audio"),
    ("audio", "audio"),
    ("mel", "audio"),
    ("ids", "text"),
    ("label", "text"),
    ("cross", "text"),
    ("token", "text"),
    ("text", "text"),
)


KNOWN_MODALITIES = frozenset(modality for _, modality in _MODALITY_OF_INPUT)


def modality_of_input(name: str) -> str:
    """The modality that a forward argument of this name carries; unknown names are a modality of their own, as is what
    a model is to produce (`output_image_values`), unless given as tokens (`output_image_ids`)."""
    if name.startswith("output_"):
        return "text" if name.endswith("ids") else name.removesuffix("_values")
    for part, modality in _MODALITY_OF_INPUT:
        if part in name:
            return modality
    return name.removesuffix("_values")


@dataclass
class Region:
    """Nodes that become one segment. `kind`: the layer kind, or None for what lies outside layers; calls that stand for
    a repeat are not among a kind's nodes."""

    name: str
    block: str
    role: str
    nodes: list[fx.Node] = field(default_factory=list)
    kind: LayerKind | None = None


@dataclass
class Regions:
    """All regions, blocks in order of dataflow, and the region of each node."""

    regions: list[Region]
    blocks: list[str]
    of_node: dict[fx.Node, Region]


def node_path(node: fx.Node) -> str:
    """Path in the user's model of the module that the node was traced in ("" for the model itself)."""
    return str(node.meta.get("module_path", ""))


def is_repeat(node: fx.Node) -> bool:
    """True for a call that stands for a repeated layer, and for the results taken from it."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return is_repeat(node.args[0])
    return node.target is torch.ops.omnicompile.repeated_layer.default


def _layer_of(node: fx.Node, traced: dict[str, LayerKind]) -> LayerKind | None:
    """The innermost traced layer that the node was traced in."""
    if is_repeat(node):
        call = node.args[0] if node.target is operator.getitem else node
        assert isinstance(call, fx.Node)
        index = call.args[2]
        return next(kind for kind in traced.values() if kind.index == index)
    path = node_path(node)
    while path:
        if path in traced:
            return traced[path]
        path = path.rpartition(".")[0]
    return None


def _modalities(traced: TracedForward) -> dict[fx.Node, frozenset[str]]:
    """The modalities that each node's value depends on; nodes that depend on none take those of their users."""
    found: dict[fx.Node, frozenset[str]] = {}
    for node in traced.graph.graph.nodes:
        if node.op == "placeholder":
            name = traced.inputs.get(node.name)
            if traced.host_inputs.get(node.name) == "input_ids":  # token ids are text even where they are metadata
                name = "input_ids"
            found[node] = frozenset([modality_of_input(name)]) if name is not None else frozenset()
        else:
            found[node] = frozenset().union(*(found[i] for i in node.all_input_nodes))
    for node in reversed(list(traced.graph.graph.nodes)):
        if not found[node] and node.users:
            smallest = min((found[u] for u in node.users if found[u]), key=len, default=frozenset())
            found[node] = smallest
    return found


def _block_name(modalities: frozenset[str]) -> str:
    if "text" in modalities or not modalities:
        return "text"
    if modalities == {"vision", "video"}:
        return "vision"
    return "_".join(sorted(modalities))


def _kind_blocks(traced: TracedForward, modality: dict[fx.Node, frozenset[str]], by_path: dict[str, LayerKind]):
    """The block of each layer kind: everything that its nodes (and repeats) depend on together."""
    together: dict[int, frozenset[str]] = {}
    for node in traced.graph.graph.nodes:
        if node.op == "call_function" and (kind := _layer_of(node, by_path)) is not None:
            together[kind.index] = together.get(kind.index, frozenset()) | modality[node]
    return {index: _block_name(m) for index, m in together.items()}


def _kind_name(kind: LayerKind, block: str, kinds: list[LayerKind], taken: set[str]) -> str:
    """ "vision.blocks", or "vision.blocks@7" when the list holds several kinds, 7 being the first of this one.

    More of the path is given where a block has two lists of that name.
    """
    *owners, index = kind.path.split(".")
    siblings = [k for k in kinds if k.path.split(".")[:-1] == owners]
    suffix = "" if len(siblings) == 1 else f"@{index}"
    for length in range(1, len(owners) + 1):
        name = ".".join([block, *owners[-length:]]) + suffix
        if name not in taken:
            return name
    return f"{block}.{kind.path}"


def _reach(nodes: list[fx.Node], seeds: set[fx.Node], forward: bool) -> set[fx.Node]:
    """`seeds` and everything downstream (or upstream) of them."""
    reached = set(seeds)
    for node in nodes if forward else reversed(nodes):
        if node in reached:
            continue
        neighbours = node.all_input_nodes if forward else list(node.users)
        if any(n in reached for n in neighbours):
            reached.add(node)
    return reached


def find_regions(traced: TracedForward) -> Regions:
    """Assign every call of the graph to a region. Placeholders belong to none."""
    nodes = list(traced.graph.graph.nodes)
    by_path = {kind.path: kind for kind in traced.repeats.kinds}
    modality = _modalities(traced)
    block_of_kind = _kind_blocks(traced, modality, by_path)
    kind_regions: dict[int, Region] = {}
    for kind in traced.repeats.kinds:
        block = block_of_kind.get(kind.index, "text")
        taken = {region.name for region in kind_regions.values()}
        name = _kind_name(kind, block, traced.repeats.kinds, taken)
        kind_regions[kind.index] = Region(name, block, "layer", kind=kind)
    of_node: dict[fx.Node, Region] = {}
    outside: dict[str, list[fx.Node]] = {}
    for node in nodes:
        if node.op != "call_function":
            continue
        source = node.args[0] if node.target is operator.getitem else None
        if isinstance(source, fx.Node) and source in of_node:
            of_node[node] = of_node[source]
        elif isinstance(source, fx.Node) and source.op == "call_function":
            outside[_block_name(modality[source])].append(node)
        elif (kind_found := _layer_of(node, by_path)) is not None:
            of_node[node] = kind_regions[kind_found.index]
        else:
            outside.setdefault(_block_name(modality[node]), []).append(node)
    regions = list(kind_regions.values())
    for block, members in outside.items():
        regions += _cut_outside(nodes, block, members, of_node)
    for node in nodes:
        if node in of_node and not is_repeat(node):
            of_node[node].nodes.append(node)
    ordered = _execution_order(regions, nodes, of_node)
    blocks = list(dict.fromkeys(r.block for r in ordered))
    blocks.sort(key=lambda b: b == "text")
    return Regions(ordered, blocks, of_node)


def _cut_outside(
    nodes: list[fx.Node], block: str, members: list[fx.Node], of_node: dict[fx.Node, Region]
) -> list[Region]:
    """What lies outside the layers of a block: before them (embedding), after them (projector or head), or between."""
    layers = {n for n, r in of_node.items() if r.kind is not None and r.block == block}
    loss = {n for out in nodes if out.op == "output" for n in out.all_input_nodes}
    after, before = _reach(nodes, layers, True), _reach(nodes, layers, False)
    holds_loss = bool(loss & set(members))
    first, last = Region(f"{block}.embed", block, "embed"), Region(f"{block}.head", block, "head")
    between = Region(f"{block}.between", block, "other")
    if not holds_loss:
        last = Region(f"{block}.projector", block, "projector")
    for node in members:
        if not layers:
            region = last
        elif node in after and node in before:
            region = between
        elif node in after:
            region = last
        elif node in before:
            region = first
        else:
            # Neither feeds a layer nor comes from one: the loss's own preparation (label shift), a learned query of
            # a pooling head, or a bypass. All are used after the layers.
            region = last
        of_node[node] = region
    present = {id(of_node[n]) for n in members}
    return [r for r in (first, between, last) if id(r) in present]


def _execution_order(regions: list[Region], nodes: list[fx.Node], of_node: dict[fx.Node, Region]) -> list[Region]:
    """Regions in the order of their places in `nodes`."""
    place = region_places(regions, nodes, of_node)
    return sorted((r for r in regions if r.name in place), key=lambda r: place[r.name])


def region_places(regions: list[Region], nodes: list[fx.Node], of_node: dict[fx.Node, Region]) -> dict[str, float]:
    """When each region runs, by name, counted in nodes.

    Layers, and what lies between them, run where their first node stands. The rest runs where its last node stands,
    when all its inputs exist; an embedding in any case before the layers of its block.
    """
    place: dict[str, float] = {}
    layers: dict[str, float] = {}
    for index, node in enumerate(nodes):
        region = of_node.get(node)
        if region is None or is_repeat(node):
            continue
        if region.kind is not None:
            layers.setdefault(region.block, index)
        if region.kind is not None or region.role == "other":
            place.setdefault(region.name, index)
        else:
            place[region.name] = index
    for region in regions:
        if region.role == "embed" and region.name in place:
            place[region.name] = min(place[region.name], layers.get(region.block, len(nodes)) - 0.5)
    return place
