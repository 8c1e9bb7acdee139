"""Operators without effect go, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from omnicompile.passes.no_ops import no_ops_pass

aten = torch.ops.aten


def test_what_gives_back_its_input_goes() -> None:
    def function(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = aten.slice.Tensor(aten.permute.default(aten.detach.default(x), [0, 1]), 0, 0, 9223372036854775807)
        y = aten.t.default(aten.t.default(aten.pow.Tensor_Scalar(y, 1.0)))
        y = aten.transpose.int(aten.transpose.int(aten.mul.Tensor(y, 1.0), 0, 1), 1, 0)
        return aten.mm.default(aten.view.default(y, [8, 4]), w), aten.expand.default(y, [8, 4])

    x, w = torch.randn(8, 4), torch.randn(4, 3)
    gm = make_fx(function)(x, w)
    want = function(x, w)
    assert no_ops_pass(gm) == 9
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [aten.mm.default]
    assert all(torch.equal(a, b) for a, b in zip(gm(x, w), want))


def test_what_changes_something_stays() -> None:
    def function(x: Tensor) -> list[Tensor]:
        return [
            aten.permute.default(x, [1, 0]),
            aten.slice.Tensor(x, 0, 1, 4),
            aten.view.default(x, [2, 8]),
            aten.t.default(aten.transpose.int(x, 0, 1)),
            aten.pow.Tensor_Scalar(x, 2),
            aten.mul.Tensor(x, 2.0),
            aten.clone.default(x),
            aten._to_copy.default(x, dtype=torch.float64),
            aten.expand.default(aten.unsqueeze.default(x, 0), [3, 4, 4]),
        ]

    x = torch.randn(4, 4)
    gm = make_fx(function)(x)
    before = len(gm.graph.nodes)
    assert no_ops_pass(gm) == 0
    assert len(gm.graph.nodes) == before


def test_a_number_may_make_another_dtype() -> None:
    gm = make_fx(lambda x: aten.mul.Tensor(x, 1.0))(torch.ones(3, dtype=torch.int64))
    assert no_ops_pass(gm) == 0
