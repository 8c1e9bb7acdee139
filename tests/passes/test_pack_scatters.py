"""Coalesced reduce-scatters as one of a flat buffer."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from omnicompile.passes.pack_scatters import pack_scatters_pass
from omnicompile.torch_compat import new_fake_mode

_c10d = torch.ops._c10d_functional
TOGETHER, ALONE = _c10d.reduce_scatter_tensor_coalesced.default, _c10d.reduce_scatter_tensor.default


def two_gradients(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    first, second = _c10d.reduce_scatter_tensor_coalesced([a @ a.t(), (b * 2).t()], "sum", 2, "group")
    later = a.sum()
    return _c10d.wait_tensor(second), _c10d.wait_tensor(first) + later


def traced() -> fx.GraphModule:
    with new_fake_mode():
        return make_fx(two_gradients)(torch.empty(4, 3), torch.empty(5, 6))


def test_the_graph() -> None:
    gm = traced()
    assert pack_scatters_pass(gm) == 1
    assert not gm.graph.find_nodes(op="call_function", target=TOGETHER)
    names = [str(node.target).removeprefix("aten.").removeprefix("_c10d_functional.") for node in gm.graph.nodes]
    assert names[2:-1] == [
        "t.default", "mm.default", "mul.Tensor", "t.default", "reshape.default", "reshape.default", "cat.default",
        "view.default", "reduce_scatter_tensor.default", "sum.default", "wait_tensor.default", "slice.Tensor",
        "view.default", "slice.Tensor", "view.default", "add.Tensor",
    ]  # fmt: skip
    second, first = gm.graph.output_node().args[0]
    assert [tuple(node.meta["val"].shape) for node in (second, first)] == [(3, 5), (2, 4)]
    assert pack_scatters_pass(gm) == 0


class OneRankOfTwo(fx.Interpreter):
    """Both ranks have the same; this one is given its part of the sum."""

    def __init__(self, gm: fx.GraphModule, rank: int) -> None:
        super().__init__(gm)
        self.rank = rank

    def call_function(self, target: object, args: tuple, kwargs: dict) -> object:  # type: ignore[type-arg, override]
        if target is TOGETHER:
            return [2 * x.chunk(2)[self.rank] for x in args[0]]
        if target is ALONE:
            return 2 * args[0].chunk(2)[self.rank]
        if target is _c10d.wait_tensor.default:
            return args[0]
        return super().call_function(target, args, kwargs)  # type: ignore[arg-type]


def test_every_rank_gets_what_it_got() -> None:
    values = torch.randn(4, 3), torch.randn(5, 6)
    packed = traced()
    pack_scatters_pass(packed)
    for rank in range(2):
        want, got = (OneRankOfTwo(gm, rank).run(*values) for gm in (traced(), packed))
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
