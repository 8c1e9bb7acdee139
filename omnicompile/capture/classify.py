"""What kind of work an ATen operator of a joint graph is."""

from __future__ import annotations

import operator
from functools import cache

import torch
from torch import Tensor, fx

from omnicompile.anchors import attention as _attention  # noqa: F401  (these define the operators named below)
from omnicompile.anchors import experts as _experts  # noqa: F401
from omnicompile.anchors import markers as _markers  # noqa: F401
from omnicompile.torch_compat import OpOverload

aten = torch.ops.aten
omni = torch.ops.omnicompile

MATMULS = frozenset(
    {aten.mm.default, aten.addmm.default, aten.addmm_.default, aten.bmm.default, aten.baddbmm.default,
     aten.linear.default}
)  # fmt: skip
CONVOLUTIONS = frozenset({aten.convolution.default, aten.convolution_backward.default})
ATTENTION = frozenset({omni.attention.default, omni.attention_backward.default})
GROUPED = frozenset({omni.grouped_mm.default, omni.grouped_mm_weight.default})
HEAVY = MATMULS | CONVOLUTIONS | ATTENTION | GROUPED

# Memory-bound work that Inductor does not fuse with its neighbours: it moves data by index, sorts, or is an anchor.
_UNFUSED = frozenset(
    {
        aten.embedding.default, aten.embedding_dense_backward.default, aten.index.Tensor, aten.index_put.default,
        aten.index_put_.default, aten.index_select.default, aten.index_add.default, aten.gather.default,
        aten.scatter.value, aten.scatter.src, aten.scatter_add.default, aten.scatter_add_.default,
        aten.masked_scatter.default,
        aten.masked_scatter_backward.default, aten.sort.default, aten.sort.stable, aten.topk.default,
        aten.cumsum.default, aten.nonzero.default, aten.bincount.default, omni.expert_dispatch.default,
        omni.expert_dispatch_backward.default, omni.expert_combine.default, omni.expert_combine_backward.default,
        omni.expert_bias.default, omni.expert_bias_backward.default,
    }
)  # fmt: skip
_RANDOM_TAG = torch.Tag.nondeterministic_seeded
_FREE = frozenset({operator.getitem, omni.backward_starts.default})


def is_view(node: fx.Node) -> bool:
    """True if the result shares its first argument's storage and the operator does no work."""
    if node.target is aten._unsafe_view.default or node.target is aten.lift_fresh_copy.default:
        return True
    return isinstance(node.target, OpOverload) and _aliases(node.target) == "read"


def is_free(node: fx.Node) -> bool:
    """True for nodes that cost nothing: views, tuple access, markers, sizes."""
    if node.op != "call_function" or node.target in _FREE or is_view(node):
        return True
    value = node.meta.get("val")
    parts = value if isinstance(value, tuple | list) else (value,)
    return not any(isinstance(v, Tensor) for v in parts)


def is_fusible(node: fx.Node) -> bool:
    return not is_free(node) and node.target not in HEAVY and node.target not in _UNFUSED


def is_cheap(node: fx.Node) -> bool:
    """Worth running again rather than keeping its result: bandwidth-bound and without randomness."""
    if is_free(node):
        return True
    random = isinstance(node.target, OpOverload) and _RANDOM_TAG in node.target.tags
    return is_fusible(node) and not random


def is_in_place(node: fx.Node) -> bool:
    """True if the call writes into its first argument."""
    return isinstance(node.target, OpOverload) and _aliases(node.target) == "write"


@cache
def _aliases(target: OpOverload) -> str:
    """How an operator's result shares memory with what it takes: "read", "write", or "" if it does not. Kept, since
    schemas are slow to read and passes ask for every node many times."""
    returns = target._schema.returns
    alias = returns[0].alias_info if returns else None
    return "" if alias is None else "write" if alias.is_write else "read"


def storage_of(node: fx.Node) -> fx.Node:
    """The node whose result holds the memory that `node`'s result lives in.

    An element of a tuple of views (`split`) lives in what was split; of any other tuple it is a tensor of its own.
    """
    while node.op == "call_function" and node.args and isinstance(source := node.args[0], fx.Node):
        if not (is_view(node) or is_in_place(node) or (node.target is operator.getitem and is_view(source))):
            break
        node = source
    return node
