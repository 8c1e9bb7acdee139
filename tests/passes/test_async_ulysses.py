"""Exchanges are launched early and waited for late, and nothing else changes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from omnicompile.capture.classify import HEAVY
from omnicompile.lowering.step_graph import trace_step
from omnicompile.passes import lower_forward
from omnicompile.passes.async_ulysses import EXCHANGE, is_exchange_wait, schedule_exchanges_pass
from omnicompile.passes.liveness import peak_bytes
from omnicompile.passes.simulate import bound_to_fake_groups, rank_values
from omnicompile.plan import Mesh, Overlap
from omnicompile.recompute import Recompute
from omnicompile.torch_compat import local_ranks_mode, new_fake_mode, on_each_rank

from .steps import lowered, whole_values_of

_c10d = torch.ops._c10d_functional


@dataclass
class Watch:
    """Every product takes `product` seconds, every exchange `exchange`."""

    product: float = 1.0
    exchange: float = 1.0

    def compute_seconds(self, node: fx.Node) -> float:
        return self.product

    def exchange_seconds(self, node: fx.Node) -> tuple[str, float]:
        return "link", self.exchange


def swap(x: Tensor) -> Tensor:
    return _c10d.wait_tensor(_c10d.all_to_all_single(x.clone(), [x.shape[0] // 2] * 2, [x.shape[0] // 2] * 2, "g"))


def step(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    """Attention without its softmax, between exchanges, and its backward; c's gradient comes before b's and a's."""
    q = swap(x @ a)
    k = swap(x @ b)
    o = swap(q @ k)
    loss = (o @ c).sum()
    dy = torch.ones_like(o)
    dc = o.t() @ dy
    do = swap(dy @ c.t())
    dk = swap(q.t() @ do)
    dq = swap(do @ k.t())
    db = x.t() @ dk
    da = x.t() @ dq
    return loss, da, db, dc, dk @ b.t() + dq @ a.t()


NAMES = {
    torch.ops.aten.mm.default: "mm",
    EXCHANGE: "launch",
    torch.ops.aten.sum.default: "sum",
    torch.ops.aten.add.Tensor: "add",
}


def traced(size: int = 8) -> fx.GraphModule:
    with new_fake_mode():
        arguments = [torch.empty(size, size) for _ in range(4)]
        gm = make_fx(step)(*arguments)
    for node in gm.graph.find_nodes(op="placeholder"):
        node.meta["nn_module_stack"] = {"layer": ("layers.0", None)}
    return gm


def written(gm: fx.GraphModule) -> list[str]:
    """Products, launches and waits in order, each with its number in the graph as it was traced."""
    lines = []
    for node in gm.graph.nodes:
        number = node.name.rpartition("_")[2] if node.name[-1].isdigit() else "0"
        name = "wait" if is_exchange_wait(node) else NAMES.get(node.target, "")
        if name in ("mm", "launch", "wait"):
            lines.append(f"{name} {number}")
        elif name:
            lines.append(name)
    return lines


def test_the_order_of_one_layer() -> None:
    gm = traced()
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")][1:]
    before = (
        "mm 0, launch 0, wait 0, mm 1, launch 1, wait 1, mm 2, launch 2, wait 2, mm 3, sum, "
        "mm 4, mm 5, launch 3, wait 3, mm 6, launch 4, wait 4, mm 7, launch 5, wait 5, mm 8, mm 9, mm 10, mm 11, add"
    )
    assert ", ".join(written(gm)) == before
    done = schedule_exchanges_pass(gm, names, Watch(), most_memory=2.0)
    # mm 4 is c's gradient: it fills the wait for what comes back from the output's exchange
    after = (
        "mm 0, launch 0, mm 1, launch 1, wait 0, wait 1, mm 2, launch 2, wait 2, mm 3, sum, "
        "mm 5, launch 3, mm 4, wait 3, mm 6, launch 4, mm 7, launch 5, wait 4, mm 8, mm 10, wait 5, mm 9, mm 11, add"
    )
    assert ", ".join(written(gm)) == after
    assert done.done and done.exchanges == 6 and done.moved == 1


def test_nothing_is_moved_into_a_wait_that_does_not_stand_still() -> None:
    gm = traced()
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")][1:]
    assert schedule_exchanges_pass(gm, names, Watch(exchange=0.0), most_memory=2.0).moved == 0


def test_too_much_memory_leaves_the_graph_as_it_was() -> None:
    gm = traced()
    before = [node.name for node in gm.graph.nodes]
    done = schedule_exchanges_pass(gm, [], Watch(), most_memory=0.5)
    assert not done.done and [node.name for node in gm.graph.nodes] == before


def test_the_peak_is_that_of_the_graph_as_it_will_run() -> None:
    """What is measured decides, by whatever it is measured: here the first graph is given 100 bytes, any other 300."""
    gm = traced()
    before = [node.name for node in gm.graph.nodes]

    def measure(graph: torch.fx.GraphModule) -> int:
        return 100 if [node.name for node in graph.graph.nodes] == before else 300

    done = schedule_exchanges_pass(gm, [], Watch(), most_memory=2.0, measure=measure)
    assert not done.done and done.peak_before == 100 and [node.name for node in gm.graph.nodes] == before
    assert schedule_exchanges_pass(gm, [], Watch(), most_memory=3.0, measure=measure).peak == 300


def test_writes_and_random_draws_keep_their_order() -> None:
    def draws(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept = torch.zeros_like(x)
        first = torch.rand_like(x)
        kept.add_(first)
        copy = kept.clone()
        kept.mul_(2.0)
        second = swap(torch.rand_like(x) @ x)
        return second.sum(), copy, kept

    with new_fake_mode():
        gm = make_fx(draws)(torch.empty(4, 4))
    schedule_exchanges_pass(gm, [], Watch(), most_memory=2.0)
    order = [node.name for node in gm.graph.nodes]
    wanted = ["rand_like", "add_", "clone", "mul_"]
    assert [name for name in order if name in wanted] == wanted
    assert order.index("rand_like") < order.index("rand_like_1")


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_graph_stays_in_order_of_what_it_reads(data: st.DataObject) -> None:
    """Random graphs of products, sums and exchanges."""
    graph = fx.Graph()
    values = [graph.placeholder(f"p{i}") for i in range(3)]
    for _ in range(data.draw(st.integers(1, 30))):
        one, other = data.draw(st.sampled_from(values)), data.draw(st.sampled_from(values))
        kind = data.draw(st.sampled_from(["mm", "add", "swap"]))
        if kind == "swap":
            launch = graph.call_function(EXCHANGE, (one, [2, 2], [2, 2], "g"))
            values.append(graph.call_function(_c10d.wait_tensor.default, (launch,)))
        else:
            target = torch.ops.aten.mm.default if kind == "mm" else torch.ops.aten.add.Tensor
            values.append(graph.call_function(target, (one, other)))
    graph.output((values[-1], *data.draw(st.lists(st.sampled_from(values[3:] or values), max_size=4))))
    with new_fake_mode():
        value = torch.empty(4, 4)
    for node in graph.nodes:
        node.meta["val"] = value
    gm = fx.GraphModule(torch.nn.Module(), graph)
    before, nodes = peak_bytes(gm, in_flight=True).total, set(graph.nodes)
    done = schedule_exchanges_pass(gm, [], Watch(), most_memory=1.2)
    graph.lint()  # every node after what it reads
    assert set(graph.nodes) == nodes and peak_bytes(gm, in_flight=True).total <= 1.2 * before
    assert done.exchanges == len([n for n in nodes if n.target is EXCHANGE])


def results(
    kind: str, policy: Recompute, mesh: Mesh, overlap: Overlap, scheduled: bool | None = None
) -> tuple[list[str], list[list[Tensor]]]:
    """Products and exchanges of the step graph in order, and by rank the loss and the gradients of its shards.
    scheduled: whether the graph made for `overlap` gets the schedule; None: as `overlap` says."""
    original, _ = lowered(kind, policy, mesh)
    program = lower_forward(replace(original, overlap=overlap))
    bound = bound_to_fake_groups(program)
    exchanges = overlap.exchanges if scheduled is None else scheduled
    gm = trace_step(replace(bound, overlap=replace(overlap, exchanges=exchanges))).gm
    whole = whole_values_of(kind, original, program, mesh.data_ranks)
    with local_ranks_mode(mesh.world), torch.no_grad():
        # of more than two data ranks some have the same batch
        values = rank_values(bound, lambda name, data_rank: whole[data_rank % len(whole)][name])
        names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
        outputs = [on_each_rank(value) for value in gm(*(values[name].detach() for name in names))]
    order = [str(n.target) for n in gm.graph.nodes if n.target in HEAVY or n.target is EXCHANGE or is_exchange_wait(n)]
    return order, [list(v) for v in zip(*outputs)]


@pytest.mark.parametrize(
    "kind, policy, mesh",
    [
        ("vlm", Recompute.NONE, Mesh(sp=2)),
        ("moe", Recompute.FULL, Mesh(sp=2, ep=2)),
        pytest.param("vlm", Recompute.EXCEPT_ATTENTION, Mesh(dp_shard=2, sp=2), marks=pytest.mark.slow),
        pytest.param("moe", Recompute.SELECTIVE, Mesh(dp_shard=2, sp=2, ep=4), marks=pytest.mark.slow),
    ],
)
def test_results_keep_their_bits(kind: str, policy: Recompute, mesh: Mesh) -> None:
    order, want = results(kind, policy, mesh, Overlap(), scheduled=False)
    other, got = results(kind, policy, mesh, Overlap())
    assert order != other and sorted(order) == sorted(other)
    for mine, theirs in zip(got, want):
        assert len(mine) > 5 and all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
