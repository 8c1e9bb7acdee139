"""Experts in chunks give the same, with one exchange of counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx

from omnicompile.errors import LoweringError
from omnicompile.lowering.step_graph import trace_step
from omnicompile.passes import expert_ops, lower_forward
from omnicompile.passes.async_ulysses import is_exchange_wait
from omnicompile.passes.liveness import peak_bytes
from omnicompile.passes.simulate import bound_to_fake_groups
from omnicompile.plan import Mesh, Overlap
from omnicompile.recompute import Recompute
from omnicompile.torch_compat import local_ranks_mode, on_each_rank, ranked, start_fake_group

from .steps import lowered
from .test_async_ulysses import results

MESH = Mesh(sp=2, ep=2)  # of 4 experts


def chunked(chunks: int) -> fx.GraphModule:
    original, _ = lowered("moe", Recompute.NONE, MESH)
    return lower_forward(replace(original, overlap=Overlap(expert_chunks=chunks))).gm


def test_the_graph_of_two_chunks() -> None:
    """order, a, b = dispatch; two products with a piece of each weight for each chunk; combine of both."""
    grouped = torch.ops.omnicompile.grouped_mm.default
    for dispatch in chunked(2).graph.find_nodes(op="call_function", target=expert_ops.chunked_dispatch):
        assert dispatch.args[2:5] == (4, 2, 2)
        items = sorted(dispatch.users, key=lambda node: node.args[1])
        assert [item.args[1] for item in items] == [0, 1, 2]
        (combine,) = (user for user in items[0].users if user.target is expert_ops.chunked_combine)
        assert combine.args[0] is items[0] and len(combine.args) == 5
        for part, (result, *_) in zip(items[1:], combine.args[3:]):
            products, stack = set(), [result]
            while stack:
                node = stack.pop()
                if node not in products and node.target is not expert_ops.chunked_dispatch:
                    products.add(node)
                    stack += [s for s in node.all_input_nodes if s.op == "call_function"]
            mine = [node for node in products if node.target is grouped]
            assert len(mine) == 2
            numbers = {node.args[1].args[1] for node in mine}
            assert numbers == {items.index(part) - 1}  # the pieces of the chunk's experts
            assert {node.args[1].args[0].target for node in mine} == {torch.ops.aten.split.Tensor}
    assert not chunked(2).graph.find_nodes(op="call_function", target=expert_ops.dispatch)


def test_chunks_that_do_not_divide_the_experts_are_refused() -> None:
    with pytest.raises(LoweringError, match=r"2 experts of a rank in .* cannot be cut into 3 chunks"):
        chunked(3)


@pytest.mark.parametrize(
    "mesh, policy",
    [
        (MESH, Recompute.NONE),
        pytest.param(Mesh(sp=2, ep=2), Recompute.FULL, marks=pytest.mark.slow),
        pytest.param(Mesh(dp_shard=4, sp=2, ep=2), Recompute.SELECTIVE, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("exchanges", [True, False])
def test_results_keep_their_bits(mesh: Mesh, policy: Recompute, exchanges: bool) -> None:
    _, want = results("moe", policy, mesh, Overlap(exchanges=False))
    order, got = results("moe", policy, mesh, Overlap(exchanges=exchanges, expert_chunks=2))
    assert order.count("omnicompile.grouped_mm.default") >= 16
    for mine, theirs in zip(got, want):
        assert len(mine) > 5 and all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_a_chunk_does_not_wait_for_the_rows_of_another() -> None:
    """The products of the first chunk's gradients run before the second chunk's are waited for."""
    original, _ = lowered("moe", Recompute.SELECTIVE, MESH)
    program = lower_forward(replace(original, overlap=Overlap(expert_chunks=2)))
    nodes = list(trace_step(bound_to_fake_groups(program)).gm.graph.nodes)
    starts = [i for i, n in enumerate(nodes) if n.target is torch.ops.omnicompile.expert_combine_backward.default]
    assert starts
    for start in starts:
        waits = [i for i in range(start, len(nodes)) if is_exchange_wait(nodes[i])][:2]
        assert any(node.target is torch.ops.omnicompile.grouped_mm.default for node in nodes[waits[0] : waits[1]])


def test_chunks_take_no_more_memory() -> None:
    """What is put together from chunks is kept for the backward, not the chunks too."""
    original, _ = lowered("moe", Recompute.NONE, MESH)
    peaks = []
    for chunks in (1, 2):
        program = lower_forward(replace(original, overlap=Overlap(expert_chunks=chunks)))
        peaks.append(peak_bytes(trace_step(bound_to_fake_groups(program)).gm, in_flight=True).total)
    assert peaks[1] <= 1.03 * peaks[0]


def through_experts(x: Tensor, index: Tensor, weight: Tensor, own: Tensor, experts: int, chunks: int) -> Tensor:
    """As the passes write it, over 2 ranks. own: matrices of a rank's experts."""
    group, grouped_mm = dist.group.WORLD.group_name, torch.ops.omnicompile.grouped_mm
    if chunks == 1:
        rows, order, counts, *rest = expert_ops.dispatch(x, index, experts, 2, group)
        return expert_ops.combine(grouped_mm(rows, own, counts, False), order, weight, *rest, group)
    order, *parts = expert_ops.chunked_dispatch(x, index, experts, 2, chunks, group)
    returned = [
        (expert_ops.as_arrived(grouped_mm(rows, piece, counts, False), sorting), sent, received)
        for (rows, counts, sorting, sent, received), piece in zip(parts, own.chunk(chunks))
    ]
    return expert_ops.chunked_combine(order, weight, group, *returned)


@pytest.mark.parametrize("experts, chunks", [(2, 1), (4, 1), (8, 1), (4, 2), (8, 2), (8, 4)])
def test_rows_visit_their_experts_and_return(experts: int, chunks: int) -> None:
    torch.manual_seed(experts * chunks)
    start_fake_group(2)
    xs = [torch.randn(12, 4, requires_grad=True) for _ in range(2)]
    indices = [torch.rand(12, experts).topk(2).indices for _ in range(2)]
    weights = [torch.rand(12, 2) for _ in range(2)]
    scale = torch.arange(1.0, experts + 1)
    matrices = list((scale[:, None, None] * torch.eye(4)).chunk(2))
    with local_ranks_mode(2):
        x = ranked([value.detach().clone() for value in xs]).requires_grad_()
        out = through_experts(x, ranked(indices), ranked(weights), ranked(matrices), experts, chunks)
        out.sum().backward()
    for value, index, weight, got, grad in zip(xs, indices, weights, on_each_rank(out), on_each_rank(x.grad)):
        want = value * (weight * scale[index]).sum(1, keepdim=True)
        want.sum().backward()
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(grad, value.grad)
