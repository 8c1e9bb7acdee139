"""Exchanges of recomputed values start ahead of the products that hide them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from omnicompile.passes.early_recompute import recompute_ahead
from omnicompile.passes.segments import FORWARD, RECOMPUTE
from omnicompile.torch_compat import new_fake_mode

_c10d = torch.ops._c10d_functional
EXCHANGE, MM = _c10d.all_to_all_single.default, torch.ops.aten.mm.default


@dataclass
class Watch:
    exchange: float

    def compute_seconds(self, node: fx.Node) -> float:
        return 1.0

    def exchange_seconds(self, node: fx.Node) -> tuple[str, float]:
        return "link", self.exchange


def launch(x: Tensor) -> Tensor:
    return _c10d.all_to_all_single(x, [4, 4], [4, 4], "g")


def layer(x: Tensor, a: Tensor, b: Tensor, dy: Tensor) -> Tensor:
    """mm 0 is the forward, 1 is run again for another layer, whose exchange is launch 0. 2, 3 and 4 are the backward up
    to attention, 5 is run again, 6 is attention's backward."""
    y = x @ a
    dy = dy + _c10d.wait_tensor(launch(x @ b))
    d1 = dy @ b
    d2 = d1 @ y
    d3 = d2 @ b
    arrived = launch(d3)
    again = launch(x @ a)
    return _c10d.wait_tensor(arrived) @ _c10d.wait_tensor(again)


def traced() -> fx.GraphModule:
    with new_fake_mode():
        gm = make_fx(layer)(*(torch.empty(8, 8) for _ in range(4)))
    products = gm.graph.find_nodes(op="call_function", target=MM)
    products[0].meta["phase"] = FORWARD
    first, _, again = gm.graph.find_nodes(op="call_function", target=EXCHANGE)
    for node in (products[1], first, products[5], again):
        node.meta["phase"] = RECOMPUTE
    return gm


def order(nodes: list[fx.Node]) -> str:
    number = {node: i for target in (MM, EXCHANGE) for i, node in enumerate(n for n in nodes if n.target is target)}
    names = {n: n.name.rpartition("_")[2] if n.name[-1].isdigit() else "0" for n in number}
    return ", ".join(("mm " if n.target is MM else "launch ") + names[n] for n in nodes if n in number)


@pytest.mark.parametrize(
    "seconds, expected",
    [
        (0.0, "mm 0, mm 1, launch 0, mm 2, mm 3, mm 4, launch 1, mm 5, launch 2, mm 6"),
        (0.5, "mm 0, mm 1, launch 0, mm 2, mm 3, mm 5, launch 2, mm 4, launch 1, mm 6"),
        (2.0, "mm 0, mm 1, launch 0, mm 2, mm 5, launch 2, mm 3, mm 4, launch 1, mm 6"),
        (9.0, "mm 0, mm 5, launch 2, mm 1, launch 0, mm 2, mm 3, mm 4, launch 1, mm 6"),  # not into the forward
    ],
)
def test_as_many_products_follow_as_take_as_long(seconds: float, expected: str) -> None:
    gm = traced()
    names = {node: node.name for node in gm.graph.nodes}
    found = recompute_ahead(list(gm.graph.nodes), Watch(seconds))
    assert sorted(found, key=names.__getitem__) == sorted(gm.graph.nodes, key=names.__getitem__)
    assert order(found) == expected


def test_it_follows_what_it_reads() -> None:
    """Run again from a value of the backward: nothing moves in front of that."""
    gm = traced()
    products = gm.graph.find_nodes(op="call_function", target=MM)
    products[5].replace_input_with(products[5].args[0], products[3])
    assert order(recompute_ahead(list(gm.graph.nodes), Watch(9.0))) == (
        "mm 0, mm 1, launch 0, mm 2, mm 3, mm 5, launch 2, mm 4, launch 1, mm 6"
    )
