"""Layout "images": the encoder takes images in the order that deals whole ones out to ranks, the rest of the model in
the order of the batch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from omnicompile.errors import LoweringError
from omnicompile.passes.propagate import module_of, operator_name
from omnicompile.passes.rank_program import InputSpec, RankProgram, axis_size
from omnicompile.passes.rules.base import node_shape
from omnicompile.plan import Layout, Plan

aten = torch.ops.aten
_ATTENTION = torch.ops.omnicompile.attention.default
_COPIES = frozenset({"aten::to", "aten::_to_copy", "aten::contiguous", "aten::clone", "aten::alias"})


def order_images_pass(program: RankProgram, plan: Plan | None = None) -> RankProgram:
    """Put features back into the order of the batch where they leave an encoder whose packed images are dealt out.

    Before: `f = encoder(patches, bounds); y = masked_scatter(x, mask, f)`. After: `f = encoder(patches, bounds); g =
    index_select(f, 0, image_order_16); y = masked_scatter(x, mask, g)`, where the runtime gives `patches` and `bounds`
    of the images in one order and `image_order_16` for the way back (see `InputSpec.packed`). Safe for encoders in
    which images do not see each other, and the layout asks for that anyway.
    """
    inside = {node for node in program.gm.graph.nodes if _dealt_out(program, node)}
    if axis_size(program.mesh, "sp") == 1 or not any(_packs(node) for node in inside):
        return program
    sources = _sources(program, inside)
    patches = _patches(program, sources)
    reached = _reached(sources)
    orders: dict[int, fx.Node] = {}
    edges = [
        n for n in program.gm.graph.nodes if n in inside and n in reached and any(u not in inside for u in n.users)
    ]
    for node in edges:
        if isinstance(node.meta["val"], torch.Tensor) and node.meta["val"].numel() > 1:
            _put_back(program, node, inside, patches, orders)
    for source in sources:
        program.inputs[source.name] = replace(program.inputs[source.name], packed=True)
    program.gm.graph.lint()
    program.gm.recompile()
    program.log.append(f"images: {len(edges)} features put back into the order of the batch")
    return program


def _dealt_out(program: RankProgram, node: fx.Node) -> bool:
    return node.op == "call_function" and program.block_of(node).layout is Layout.IMAGES


def _packs(node: fx.Node) -> bool:
    """Whether it is an attention over segments."""
    return node.target is _ATTENTION and len(node.args) > 3 and isinstance(node.args[3], fx.Node)


def _sources(program: RankProgram, inside: set[fx.Node]) -> list[fx.Node]:
    """Tensors of the batch that the encoder reads, and nothing else does."""
    needed, stack = set[fx.Node](), list(inside)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += node.all_input_nodes
    sources = [n for n in needed if n.op == "placeholder" and n.name in program.inputs]
    sources = [n for n in sources if program.inputs[n.name].kind in ("input", "host")]
    for node in needed - inside:
        shared = next((u for u in node.users if u not in needed and u.op == "call_function"), None)
        if shared is not None and node in _reached(sources):
            raise LoweringError(
                f"{operator_name(shared)} in {module_of(shared)} reads what an encoder with layout 'images' reads too, "
                "but in the batch's order of images: use layout 'sequence'"
            )
    return sources


def _reached(sources: list[fx.Node]) -> set[fx.Node]:
    """What depends on `sources`."""
    found, stack = set[fx.Node](), list(sources)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.users
    return found


def _patches(program: RankProgram, sources: list[fx.Node]) -> int:
    sizes = {node_shape(n)[0] for n in sources if program.inputs[n.name].kind == "input" and node_shape(n)}
    if len(sizes) != 1:
        raise LoweringError("layout 'images' deals out the patches of one input: use layout 'sequence'")
    return sizes.pop()


def _put_back(
    program: RankProgram, node: fx.Node, inside: set[fx.Node], patches: int, orders: dict[int, fx.Node]
) -> None:
    while len(node.users) == 1 and _is_copy(user := next(iter(node.users))) and user not in inside:
        node = user
    shape = node_shape(node)
    dim = next((d for d, size in enumerate(shape) if size > 1), 0)
    rows = shape[dim]
    if patches % rows:
        raise LoweringError(
            f"{operator_name(node)} in {module_of(node)} leaves an encoder with layout 'images' with {rows} rows for "
            f"{patches} patches: use layout 'sequence'"
        )
    if rows not in orders:
        orders[rows] = _order_input(program, rows)
    with node.graph.inserting_after(node):
        new = node.graph.call_function(aten.index_select.default, (node, dim, orders[rows]))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new and user not in inside)


def _is_copy(node: fx.Node) -> bool:
    return node.op == "call_function" and operator_name(node) in _COPIES


def _order_input(program: RankProgram, rows: int) -> fx.Node:
    last = list(program.gm.graph.find_nodes(op="placeholder"))[-1]
    with program.gm.graph.inserting_after(last):
        node = program.gm.graph.placeholder(f"image_order_{rows}")
    node.meta["val"] = last.meta["val"].new_empty((rows,), dtype=torch.int64)
    program.inputs[node.name] = InputSpec(str(rows), "order")
    return node
