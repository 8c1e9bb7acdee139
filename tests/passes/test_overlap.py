"""Parameters are gathered a layer ahead and gradients scattered a layer behind."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from omnicompile.passes.overlap import last_unit, one_channel, overlap_pass
from omnicompile.passes.segments import FORWARD
from omnicompile.torch_compat import new_fake_mode

_c10d = torch.ops._c10d_functional
SHORT = {
    _c10d.all_gather_into_tensor.default: "gather",
    _c10d.all_gather_into_tensor_coalesced.default: "gather together",
    _c10d.reduce_scatter_tensor.default: "scatter",
    _c10d.reduce_scatter_tensor_coalesced.default: "scatter together",
    _c10d.all_to_all_single.default: "exchange",
    _c10d.wait_tensor.default: "wait",
    torch.ops.aten.mm.default: "mm",
    torch.ops.aten._to_copy.default: "cast",
}
LAYERS = 3
KINDS = ("gather", "scatter", "all_to_all")


def step(x: Tensor, *shards: Tensor, exchanges: bool = False) -> tuple[Tensor, ...]:
    """Layers of two products each, y = x @ a @ b, and a backward that gathers again but for the last layer. exchanges:
    of x, in the forward, before the products."""

    def gather(shard: Tensor) -> Tensor:
        return _c10d.wait_tensor(_c10d.all_gather_into_tensor(shard, 2, "g"))

    def scatter(grad: Tensor) -> Tensor:
        return _c10d.wait_tensor(_c10d.reduce_scatter_tensor(grad.double(), "sum", 2, "g"))

    seen, whole = [], []
    for a, b in zip(shards[::2], shards[1::2]):
        whole = [gather(a)]
        if exchanges:
            x = _c10d.wait_tensor(_c10d.all_to_all_single(x, [4, 4], [4, 4], "e"))
        middle = x @ whole[0]
        whole.append(gather(b))
        seen.append((x, middle))
        x = middle @ whole[1]
    loss, dy = x.sum(), torch.ones_like(x)
    grads: list[Tensor] = []
    for layer in reversed(range(LAYERS)):
        x, middle = seen[layer]
        last = layer == LAYERS - 1
        b = whole[1] if last else gather(shards[2 * layer + 1])
        grads.insert(0, scatter(middle.t() @ dy))
        dy = dy @ b.t()
        a = whole[0] if last else gather(shards[2 * layer])
        grads.insert(0, scatter(x.t() @ dy))
        dy = dy @ a.t()
    return (loss, *grads, dy)


def traced(function: Callable[..., tuple[Tensor, ...]] = step, shards: int = 2 * LAYERS) -> fx.GraphModule:
    mode = new_fake_mode()
    with mode:
        arguments = [torch.empty(8, 8), *(torch.empty(4, 8) for _ in range(shards))]
    with mode:
        gm = make_fx(function)(*arguments)
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")][1:]
    turned = False
    for node in gm.graph.nodes:
        turned = turned or node.target is torch.ops.aten.ones_like.default
        if node.op == "call_function" and not turned:
            node.meta["phase"] = FORWARD
        if node.target is _c10d.all_gather_into_tensor.default:
            number = names.index(node.args[0].name)
            stack = {"layer": (f"layers.{number // 2}", None)}
            node.meta.update(role="param_gather", param=names[number], block="text", nn_module_stack=stack)
    return gm


def written(gm: fx.GraphModule) -> list[str]:
    """Operators in order; views left out, and one `wait` for neighbouring ones."""
    lines: list[str] = []
    for node in gm.graph.nodes:
        text = SHORT.get(node.target, "")
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        if text == "wait":
            launch = source.args[0] if source.target is operator.getitem else source
            text = f"wait for a {next(kind for kind in KINDS if kind in str(launch.target))}"
        if text and not (text.startswith("wait") and lines and lines[-1] == text):
            lines.append(text)
    return lines


def test_the_order_of_three_layers() -> None:
    gm = traced()
    placeholders = [node.name for node in gm.graph.find_nodes(op="placeholder")][1:]
    assert last_unit(gm) == set(placeholders[-2:])
    done = overlap_pass(gm, placeholders)
    assert (done.gathers, done.scatters, done.collectives_before, done.collectives) == (5, 3, 16, 8)
    forward = [
        "gather together", "wait for a gather",
        "gather together", "mm", "mm", "wait for a gather",
        "gather together", "mm", "mm", "wait for a gather",
        "gather together", "mm", "mm",
    ]  # fmt: skip
    backward = [
        "mm", "mm", "mm", "cast", "cast", "scatter together", "mm", "wait for a gather",
        "gather together", "mm", "mm", "mm", "wait for a scatter", "cast", "cast", "scatter together", "mm",
        "wait for a gather",
        "mm", "mm", "mm", "wait for a scatter", "cast", "cast", "scatter together", "mm", "wait for a scatter",
    ]  # fmt: skip
    assert written(gm) == forward + backward


def test_a_gather_of_what_is_not_a_parameter_stays() -> None:
    gm = traced()
    for node in gm.graph.nodes:
        node.meta.pop("role", None)
    before = [line for line in written(gm) if "gather" in line]
    overlap_pass(gm, [])
    assert [line for line in written(gm) if "gather" in line] == before


def test_two_layers_ahead() -> None:
    gm = traced()
    placeholders = [node.name for node in gm.graph.find_nodes(op="placeholder")][1:]
    overlap_pass(gm, placeholders, prefetch=2)
    assert written(gm)[:14] == [
        "gather together", "wait for a gather",
        "gather together", "gather together", "mm", "mm", "wait for a gather",
        "gather together", "mm", "mm", "wait for a gather",
        "gather together", "mm", "mm",
    ]  # fmt: skip


def test_gathers_go_before_exchanges_that_use_other_links() -> None:
    """Where they share the links an exchange, which something waits for, goes first."""
    orders = []
    for channel in (one_channel, lambda node: str(node.args[-1])):
        gm = traced(partial(step, exchanges=True))
        placeholders = [node.name for node in gm.graph.find_nodes(op="placeholder")][1:]
        overlap_pass(gm, placeholders, channel=channel)
        lines = written(gm)
        start = lines.index("mm") + 2  # where the second layer begins
        orders.append(lines[start : start + 6])
    assert orders == [
        ["wait for a gather", "exchange", "wait for a all_to_all", "gather together", "mm", "mm"],
        ["wait for a gather", "gather together", "exchange", "wait for a all_to_all", "mm", "mm"],
    ]


def late_step(x: Tensor, *shards: Tensor) -> tuple[Tensor, ...]:
    """`step` and one more parameter, whose gradient is computed last, of the input and of the parameter itself."""
    *others, own = shards
    whole = _c10d.wait_tensor(_c10d.all_gather_into_tensor(own, 2, "g"))
    loss, *grads, dy = step(x * whole, *others)
    again = _c10d.wait_tensor(_c10d.all_gather_into_tensor(own, 2, "g"))
    grad = (x * again.t()).double()
    return (loss, *grads, _c10d.wait_tensor(_c10d.reduce_scatter_tensor(grad, "sum", 2, "g")), dy)


def test_a_gradient_that_reads_its_parameter_stays_behind_the_gather() -> None:
    """Although all else that it reads is there from the start."""
    gm = traced(late_step, 2 * LAYERS + 1)
    placeholders = [node.name for node in gm.graph.find_nodes(op="placeholder")][1:]
    done = overlap_pass(gm, placeholders)  # refuses a graph in which something is read before it is there
    assert (done.gathers, done.scatters) == (7, 4)
    last = ["mm", "wait for a gather", "wait for a scatter", "cast", "scatter", "wait for a scatter"]
    assert written(gm)[-len(last) :] == last
