import torch
from torch import nn
from torch.nn import functional as F

from omnicompile.anchors.huggingface import anchored, is_plain_experts, is_sorted_experts
from omnicompile.capture.trace import trace_forward

EXPERTS, HIDDEN, INNER = 4, 6, 5


class Loop(nn.Module):
    """Experts in the usual form that no registry knows."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, HIDDEN))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER))
        self.act_fn = F.silu

    def forward(self, hidden_states, top_k_index, top_k_weights):
        final = torch.zeros_like(hidden_states)
        chosen = F.one_hot(top_k_index, EXPERTS).permute(2, 1, 0)
        for expert in chosen.sum(dim=(-1, -2)).nonzero()[:, 0].tolist():
            place, token = torch.where(chosen[expert])
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            rows = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            final.index_add_(0, token, rows * top_k_weights[token, place, None])
        return final


def test_a_loop_over_experts_is_anchored_for_planning_and_left_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Loop())
    index, weights = torch.tensor([[0, 1], [3, 1], [2, 0]]), torch.rand(3, 2)
    hidden = torch.randn(3, HIDDEN)
    expected = model[0](hidden, index, weights)
    assert is_plain_experts(model[0])
    with anchored(model, planning=True):
        torch.testing.assert_close(model[0](hidden, index, weights), expected)
        assert "forward" in vars(model[0])
    assert "forward" not in vars(model[0])
    with anchored(model):
        assert "forward" not in vars(model[0])


def test_other_modules_are_no_plain_experts() -> None:
    model = Loop()
    model.down_proj = nn.Parameter(torch.randn(EXPERTS + 1, HIDDEN, INNER))
    assert not is_plain_experts(model)
    assert not is_plain_experts(nn.Linear(2, 2))


def test_experts_without_a_second_matrix_hand_on_their_input_and_are_priced_too() -> None:
    model = Loop()
    model.gate_up_proj = nn.Parameter(torch.randn(EXPERTS + 2, 2 * INNER, HIDDEN))
    assert is_plain_experts(model)


class Sorting(nn.Module):
    """Multiplies rows that its caller has sorted by expert."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN))

    def forward(self, inputs, expert_size):
        parts = zip(inputs.split(expert_size), self.weight)
        return torch.cat([F.linear(rows, weight) for rows, weight in parts])


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Sorting()

    def forward(self, x):
        sizes = (x[:, :EXPERTS] > 0).long().sum(0).tolist()
        return self.inner(x, sizes).sum()


def test_rows_sorted_by_expert_are_one_grouped_product_whatever_their_counts() -> None:
    model = Routed()
    assert is_sorted_experts(model.inner) and not is_sorted_experts(nn.Linear(2, 2))
    traced = trace_forward(model, {"x": torch.zeros(10, HIDDEN)})
    products = [n for n in traced.graph.graph.nodes if "grouped_mm" in str(n.target)]
    assert [n.meta["val"].shape for n in products] == [(10, INNER)]
