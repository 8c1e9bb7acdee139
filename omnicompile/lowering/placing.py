"""Which block each node belongs to, and along which dimension an input can be cut."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, fx

from omnicompile.capture.regions import KNOWN_MODALITIES, modality_of_input
from omnicompile.errors import PlanError
from omnicompile.schema import suggestion

MAIN = "text"


def assign_blocks(gm: fx.GraphModule, blocks: Collection[str], sources: Mapping[str, Collection[str]]) -> None:
    """Set node.meta["block"] on every node, by the same rule as the planner's blocks: what depends on pixels alone is
    vision, what depends on audio features alone is audio, what depends on text too, or on several, is the backbone.

    sources: placeholder -> names of the batch's tensors that it comes from (none for parameters). Values that depend on
    no input, such as gathered parameters, belong to the block of what uses them. What `blocks` leaves out goes with the
    backbone; raises PlanError if `blocks` names one that is not there in its stead.
    """
    nodes = list(gm.graph.nodes)
    found: dict[fx.Node, frozenset[str]] = {}
    for node in nodes:
        names = sources.get(node.name, ()) if node.op == "placeholder" else ()
        own = frozenset(map(modality_of_input, names))
        found[node] = own.union(*(found[source] for source in node.all_input_nodes))
    for node in reversed(nodes):
        if not found[node]:
            found[node] = min((found[user] for user in node.users if found[user]), key=len, default=frozenset())
    # One encoder takes images and videos: a plan made with the one serves batches that have the other alone.
    alike = {a: b for a, b in (("video", "vision"), ("vision", "video")) if a not in blocks and b in blocks}
    named = {modalities: _block_name(modalities) for modalities in found.values()}
    named = {modalities: alike.get(name, name) for modalities, name in named.items()}
    known = {name for modalities, name in named.items() if modalities <= KNOWN_MODALITIES}
    _check_names(blocks, set(named.values()), known)
    main = MAIN if MAIN in blocks else next(iter(blocks))
    for node in nodes:
        name = named[found[node]]
        node.meta["block"] = name if name in blocks else main


def _check_names(blocks: Collection[str], names: Collection[str], known: Collection[str]) -> None:
    """A block that the model lacks may be one for inputs that this batch lacks, unless the plan lacks one in turn.
    known: names of modalities that the package knows; an input of any other name may go with the backbone."""
    unknown, missing = sorted(set(blocks) - set(names)), sorted(set(known) - set(blocks))
    if unknown and missing:
        raise PlanError(
            f"the plan has a block {unknown[0]!r}, which the model does not have"
            f"{suggestion(unknown[0], sorted(names))}, and none for {missing[0]!r}"
        )


def _block_name(modalities: frozenset[str]) -> str:
    if MAIN in modalities or not modalities:
        return MAIN
    return "vision" if modalities == {"vision", "video"} else "_".join(sorted(modalities))


def token_dim(value: Tensor, lengths: Collection[int]) -> int | None:
    """The one dimension of `value` that is as long as a sequence (`lengths`); None if not just one is."""
    dims = [dim for dim, size in enumerate(value.shape) if size in lengths and size > 1]
    return dims[0] if len(dims) == 1 else None
