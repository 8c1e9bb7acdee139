"""Which block each node belongs to, and along which dimension an input can be cut."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import Tensor, fx

from omnicompile.errors import LoweringError

# Words by which module trees name the towers of a modality; the same for every model.
_WORDS = {
    "vision": re.compile(r"vis(ion|ual)|image|vit|patch"),
    "audio": re.compile(r"audio|speech|acoustic|whale"),
    "video": re.compile(r"video"),
}


def module_path(node: fx.Node) -> str:
    """Path of the innermost module that the node was traced in, "" if it is none's."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    return paths[-1].removeprefix("L['self'].").removeprefix("model.") if paths else ""


def assign_blocks(gm: fx.GraphModule, blocks: Collection[str], paths: dict[str, str]) -> None:
    """Set node.meta["block"] on every node. paths: block name -> path prefix in the model ("" for what is left over);
    blocks without a path are found by the words in the module path. Values computed outside any module (placeholders)
    belong to the block of their first user."""
    main = next((b for b in blocks if paths.get(b) == ""), "text" if "text" in blocks else next(iter(blocks)))

    def block_of(path: str) -> str:
        claimed = [b for b, prefix in paths.items() if prefix and (path == prefix or path.startswith(prefix + "."))]
        if claimed:
            return max(claimed, key=lambda b: len(paths[b]))
        for name, words in _WORDS.items():
            if name in blocks and name not in paths and words.search(path):
                return name
        return main

    unknown = set(paths) - set(blocks)
    if unknown:
        raise LoweringError(f"no choices are given for the blocks {sorted(unknown)}: the plan has {sorted(blocks)}")
    for node in gm.graph.nodes:
        node.meta["block"] = block_of(module_path(node))
    for node in reversed(gm.graph.nodes):
        if node.op in ("placeholder", "get_attr") and node.users:
            node.meta["block"] = next(iter(node.users)).meta["block"]


def token_dim(value: Tensor, lengths: Collection[int]) -> int | None:
    """The one dimension of `value` that is as long as a sequence (`lengths`); None if not just one is."""
    dims = [dim for dim, size in enumerate(value.shape) if size in lengths and size > 1]
    return dims[0] if len(dims) == 1 else None
