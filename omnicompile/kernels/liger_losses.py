"""Cross-entropy, and linear with cross-entropy in chunks, by the Triton kernels of the package liger-kernel."""

from __future__ import annotations

import torch
from liger_kernel.ops.cross_entropy import cross_entropy_forward
from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward
from torch import Tensor

from omnicompile.kernels import reference
from omnicompile.kernels.registry import Functions


def _loss(logits: Tensor, target: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    # The kernel writes the gradient over the logits, if they ask for one.
    own = logits.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    loss, _, _, _, d_logits = cross_entropy_forward(
        own, target.contiguous(), None, ignore, 0.0, 0.0, "sum", None, False
    )
    return loss.detach(), d_logits.detach()


def _head_loss(hidden: Tensor, weight: Tensor, target: Tensor, ignore: int) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the weight is summed over chunks in float32."""
    found = fused_linear_cross_entropy_forward(
        hidden.contiguous(), weight.contiguous(), target.contiguous(), ignore_index=ignore, reduction="sum",
        accum_dtype=torch.float32, compute_gradients=True, weight_requires_grad=True,
    )  # fmt: skip
    return found[0], found[4], found[5]


cross_entropy = Functions(_loss, reference.scaled)
linear_cross_entropy = Functions(_head_loss, reference.scaled)
