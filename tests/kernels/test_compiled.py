"""The operators inside what torch.compile compiles."""

from __future__ import annotations

import torch
from torch import Tensor

from omnicompile.anchors import attention, experts
from omnicompile.kernels import operators

omni = torch.ops.omnicompile
_MODULES = (attention, experts, operators)  # that define the operators


def everything(q: Tensor, rows: Tensor, weight: Tensor, counts: Tensor, scale: Tensor) -> Tensor:
    """A number that every operator with implementations to choose from has a part in."""
    out, _ = omni.attention(q, q, q, None, None, None, 8, 8, True, 0.5, 0, 0.0)
    grouped = omni.grouped_mm(rows, weight, counts, False)
    normed, _ = omni.rms_norm(grouped, scale, 1e-6, 0.0, False, "reference")
    gated = omni.swiglu(normed, grouped, "reference")
    turned = omni.rope(q, q.detach().cos(), q.detach().sin(), "reference")
    target = torch.zeros(rows.shape[0], dtype=torch.int64)
    loss, _ = omni.cross_entropy(gated, target, -100, "reference")
    head, *_ = omni.linear_cross_entropy(gated, weight[0].t(), target, -100, "reference")
    return out.square().sum() + turned.sum() + loss + head


def test_inductor_takes_every_operator() -> None:
    """Value and gradients as without a compiler; Inductor hands arguments on by the names that operators give them."""
    torch.manual_seed(0)
    shapes = [(1, 2, 8, 16), (8, 16), (2, 16, 16), (16,)]
    q, rows, weight, scale = (torch.randn(shape, requires_grad=True) for shape in shapes)
    arguments = q, rows, weight, torch.tensor([3, 5]), scale
    leaves = [q, rows, weight, scale]
    want = everything(*arguments)
    expected = torch.autograd.grad(want, leaves)
    got = torch.compile(everything, fullgraph=True)(*arguments)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, leaves), expected)
