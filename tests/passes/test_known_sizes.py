"""Sizes known from numbers are not asked of tensors that would have to live until then."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from omnicompile.passes.known_sizes import known_sizes_pass
from omnicompile.torch_compat import new_fake_mode

SIZE = torch.ops.aten.sym_size.int


def parts(x: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Two parts of run-time sizes, and another part of the size of both together."""
    a, b = sizes.tolist()
    torch._check(a >= 0)
    torch._check(b >= 0)
    both = torch.cat([x.new_ones(a), x.new_ones(b)])
    return x.new_zeros(both.shape[0]), x.new_zeros(both.shape[0] + 2 * a)


def traced(function: object) -> fx.GraphModule:
    with new_fake_mode():
        return make_fx(function)(torch.empty(4), torch.empty(2, dtype=torch.int64))


def ask(gm: fx.GraphModule) -> int:
    """Let everything that reads a number ask a tensor for it. Returns how many do."""
    holders = {}
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dim() == 1 and isinstance(value.shape[0], torch.SymInt):
            holders.setdefault(value.shape[0].node.expr, node)
    count = 0
    for node in list(gm.graph.nodes):
        value = node.meta.get("val")
        holder = holders.get(value.node.expr) if isinstance(value, torch.SymInt) else None
        late = [user for user in node.users if holder is not None and user > holder]
        for user in late:
            with gm.graph.inserting_before(user):
                size = gm.graph.call_function(SIZE, (holder, 0))
            size.meta["val"] = value
            user.replace_input_with(node, size)
            count += 1
    gm.graph.lint()
    gm.recompile()
    return count


def test_a_sum_is_worked_out() -> None:
    gm = traced(parts)
    sizes = torch.tensor([3, 4])
    want = gm(torch.ones(4), sizes)
    assert ask(gm) > 0
    asked = len(gm.graph.find_nodes(op="call_function", target=SIZE))
    assert known_sizes_pass(gm) == asked
    assert not gm.graph.find_nodes(op="call_function", target=SIZE)
    assert [x.shape for x in want] == [(7,), (13,)] == [x.shape for x in gm(torch.ones(4), sizes)]


def test_sizes_that_no_number_gives_stay() -> None:
    def function(x: Tensor, sizes: Tensor) -> Tensor:
        return x.new_zeros(sizes.nonzero().shape[0] + 1)

    gm = traced(function)
    before = [node.name for node in gm.graph.nodes]
    assert known_sizes_pass(gm) == 0 and [node.name for node in gm.graph.nodes] == before
    assert gm(torch.ones(4), torch.tensor([0, 5])).shape == (2,)
