"""Results take the memory of what they are made of where Inductor's own code does."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

from omnicompile.capture.fusion import elements, fuse, in_one_piece
from omnicompile.lowering.step_prices import compiled
from omnicompile.passes.liveness import peak_bytes

ROWS, WIDTH = 48, 64
SIZE = ROWS * WIDTH * 4


def follows(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return ((x @ w).exp() @ w,)


def read_for_two_results(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    y = x @ w
    return y.exp() @ w, y.sin() @ w


def read_later(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    y = x @ w
    return y.exp() @ w, y @ w


def comes_from_outside(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (x.exp() @ w,)


def goes_outside(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    y = x @ w
    return y, y.exp() @ w


def other_dtype(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return ((x @ w).exp().double() @ w.double(),)


def row_sums_first(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    y = x @ w
    return ((y - y.mean(-1, keepdim=True)) @ w,)


def loss_and_its_gradient(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    loss = torch.nn.functional.cross_entropy(x @ w, torch.arange(ROWS) % WIDTH, reduction="sum")
    return (loss.detach(), *torch.autograd.grad(loss, [x, w]))


CASES: dict[Callable[..., Any], int] = {
    follows: 1, read_for_two_results: 0, read_later: 0, comes_from_outside: 0, goes_outside: 0, other_dtype: 0,
    row_sums_first: 1, loss_and_its_gradient: 1,
}  # fmt: skip


def traced(function: Callable[..., Any]) -> tuple[fx.GraphModule, tuple[Tensor, Tensor]]:
    inputs = torch.randn(ROWS, WIDTH), torch.randn(WIDTH, WIDTH)
    return make_fx(function)(*inputs), inputs


@pytest.mark.parametrize(("function", "taken"), CASES.items(), ids=lambda value: getattr(value, "__name__", None))
def test_written_over(function: Callable[..., Any], taken: int) -> None:
    gm, _ = traced(function)
    over = compiled(gm).over
    assert len([node for node in over if elements(node) == ROWS * WIDTH]) == taken
    assert all(elements(result) == elements(base) for result, base in over.items())


@pytest.mark.slow
@pytest.mark.parametrize(("function", "taken"), CASES.items(), ids=lambda value: getattr(value, "__name__", None))
def test_inductor_does_the_same(function: Callable[..., Any], taken: int) -> None:
    """Reuse of a large buffer by the kernel that reads it last, in the code that Inductor writes."""
    gm, inputs = traced(function)
    _, (code, *_) = run_and_get_code(torch.compile(gm, backend="inductor"), *inputs)
    lines = [line.strip() for line in code[code.index("def call") :].splitlines()]
    shape = f"({ROWS}, {WIDTH})"
    large = {line.split(" = ")[0] for line in lines if "empty_strided" in line and shape in line}
    reused = 0
    for line, after in itertools.pairwise(lines):
        if "# reuse" in line and line.split(" = ")[1].split(";")[0] in large:
            large.add(line.split(" = ")[0])
            reused += "cpp_fused" in after and line.split(" = ")[0] in after
    assert reused == taken


def test_a_peak_counts_it_once() -> None:
    """A product, written over, and the next product."""
    gm, inputs = traced(follows)
    held = sum(x.numel() * 4 for x in inputs)
    assert peak_bytes(gm, compiled=compiled(gm)).total == held + 2 * SIZE
    gm, _ = traced(read_for_two_results)
    assert peak_bytes(gm, compiled=compiled(gm)).total == held + 3 * SIZE


def test_copies_on_their_way_are_counted_until_waited_for() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    launch = graph.call_function(torch.ops._c10d_functional.all_gather_into_tensor.default, (x, 2, "g"))
    wait = graph.call_function(torch.ops._c10d_functional.wait_tensor.default, (launch,))
    total = graph.call_function(torch.ops.aten.sum.default, (wait,))
    graph.output(total)
    x.meta["val"], launch.meta["val"], total.meta["val"] = torch.ones(8), torch.ones(16), torch.ones(())
    wait.meta["val"] = launch.meta["val"]
    gm = fx.GraphModule(torch.nn.Module(), graph)
    plain, staged = peak_bytes(gm), peak_bytes(gm, staged={launch: 24})
    assert plain.total == 32 + 64 + 4 and staged.total == 32 + 64 + 24
    assert staged.holders == {"all_gather_into_tensor_default": 64, "all_gather_into_tensor_default (staged)": 24}


def test_kernels_stand_in_one_piece_before_what_reads_them() -> None:
    gm, _ = traced(read_for_two_results)
    nodes = [node for node in gm.graph.nodes if node.op == "call_function"]
    kernels = [group for group in compiled(gm).kernels if len(group) > 1]
    assert len(kernels) == 1
    order = in_one_piece(nodes, kernels)
    assert sorted(order, key=nodes.index) == nodes
    at = [order.index(node) for node in kernels[0]]
    assert max(at) - min(at) == 1
    for node in order:
        assert all(order.index(source) < order.index(node) for source in node.all_input_nodes if source in order)
    assert all(len(group) == 1 for group in fuse(nodes))
