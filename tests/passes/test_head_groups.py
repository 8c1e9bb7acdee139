"""Attention in groups of heads gives the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from omnicompile.passes import collectives, lower_forward
from omnicompile.plan import Mesh, Overlap
from omnicompile.recompute import Recompute

from .parity import relative_errors
from .steps import lowered
from .test_async_ulysses import results

ATTENTION = torch.ops.omnicompile.attention.default


def test_the_graph_of_two_groups() -> None:
    """4 heads on 2 ranks, and 2 key heads: both groups of a rank, of one head each, read its one key head."""
    original, before = lowered("moe", Recompute.NONE, Mesh(sp=2, ep=2))
    gm = lower_forward(replace(original, overlap=Overlap(head_groups=2))).gm
    calls = gm.graph.find_nodes(op="call_function", target=ATTENTION)
    assert len(calls) == 2 * len(before.gm.graph.find_nodes(op="call_function", target=ATTENTION)) > 0
    queries = [call.args[0] for call in calls[:2]]
    assert [piece.args for piece in queries] == [(queries[0].args[0], 0), (queries[0].args[0], 1)]
    assert queries[0].args[0].args[1:] == ([1, 1], 1)  # split: the gradient of all heads is put together at once
    assert [call.args[1].args[1:] for call in calls[:2]] == [(1, 0, 1), (1, 0, 1)]
    for join in gm.graph.find_nodes(op="call_function", target=collectives.join_heads):
        assert join.args[0] == 2 and [part.target for part in join.args[1:]] == [collectives.all_to_all] * 2


def test_heads_that_do_not_divide_are_left_whole() -> None:
    original, before = lowered("moe", Recompute.NONE, Mesh(sp=2, ep=2))
    after = lower_forward(replace(original, overlap=Overlap(head_groups=3)))
    assert len(after.gm.graph.nodes) == len(before.gm.graph.nodes)
    assert any("is not cut into 3 groups of heads" in note for note in after.notes)


def test_heads_of_a_rank_stay_together() -> None:
    whole = torch.arange(2 * 4).view(1, 8, 1, 1)  # 2 ranks of 4 heads
    first, second = (torch.cat([whole[:, r * 4 + g * 2 : r * 4 + g * 2 + 2] for r in range(2)], 1) for g in range(2))
    assert torch.equal(collectives.join_heads(2, first, second), whole)


@pytest.mark.parametrize(
    "kind, mesh, policy",
    [
        ("moe", Mesh(sp=2, ep=2), Recompute.NONE),
        pytest.param("vlm", Mesh(sp=2), Recompute.FULL, marks=pytest.mark.slow),
        pytest.param("vlm", Mesh(dp_shard=4, sp=2), Recompute.NONE, marks=pytest.mark.slow),
    ],
)
def test_equal_to_whole_attention(kind: str, mesh: Mesh, policy: Recompute) -> None:
    order, want = results(kind, policy, mesh, Overlap(), scheduled=False)
    more, got = results(kind, policy, mesh, Overlap(head_groups=2))
    assert len(more) > len(order)
    for mine, theirs in zip(got, want):
        assert torch.equal(mine[0], theirs[0])  # the loss keeps its bits
        one, other = ({str(i): g for i, g in enumerate(grads[1:])} for grads in (mine, theirs))
        assert max(relative_errors(one, other).values()) < 1e-5
