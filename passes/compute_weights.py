"""Parameters come in the compute dtype already: the graph does not cast them."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, fx

from omnicompile.errors import LoweringError

_CAST = torch.ops.aten._to_copy.default


def compute_weights_pass(gm: fx.GraphModule, parameters: Collection[str], dtype: torch.dtype) -> int:
    """Change a step graph in place. parameters: placeholders. Returns the number of casts taken out.

    Before (`p` in float32): `c = to_copy(p, dtype=bfloat16); w = wait(all_gather(c)); ...; g = to_copy(d, float32)`.
    After (`p` in bfloat16): `w = wait(all_gather(p)); ...; g = to_copy(d, float32)`.

    For optimizers in host memory, where the master weights stay: the device has compute weights only, and gradients
    keep the dtype of the master weights. Safe where every use of a parameter is such a cast, as for any plan that
    computes in another dtype than parameters are stored in. Raises LoweringError for another use.
    """
    casts = 0
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if node.name not in parameters or not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if value.dtype == dtype:
            continue
        for user in list(node.users):
            if user.target is not _CAST or user.kwargs.get("dtype") != dtype:
                raise LoweringError(f"{node.name} is used by {user.name} in {value.dtype}, not in the compute dtype")
            user.replace_all_uses_with(node)
            gm.graph.erase_node(user)
            casts += 1
        node.meta["val"] = value.to(dtype)
    if casts:
        gm.graph.lint()
        gm.recompile()
    return casts
