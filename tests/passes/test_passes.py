"""What passes refuse, what they record, and the contracts between them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from omnicompile.errors import InputError, LoweringError
from omnicompile.lowering.graph_capture import capture_forward
from omnicompile.passes import FORWARD_PASSES, lower_forward
from omnicompile.passes.manager import Pass, check_contracts
from omnicompile.passes.rank_program import (
    ParamSpec,
    RankProgram,
    ShardSpec,
    axis_coordinate,
    check_alignment,
    group_ranks,
)
from omnicompile.plan import Mesh, Sharding

from .models import block_plans, text_batch
from .parity import program_of


class Tiny(nn.Module):
    """Embedding, something in the middle, head and loss."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.tokens, self.middle, self.head = nn.Embedding(128, 16), middle, nn.Linear(16, 128)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.middle(self.tokens(input_ids)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Attention(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)


class Median(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.cumsum(1).logcumsumexp(1) + torch.renorm(x, 2, 0, 1.0)


class Nonzero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.masked_select(x, x > 0).sum()


def _program(middle: nn.Module, mesh: Mesh, length: int = 16, sharding: Sharding = Sharding.FSDP) -> RankProgram:
    model = Tiny(middle)
    captured, _ = capture_forward(model, text_batch(0, length))
    return program_of(captured, model, mesh, block_plans(mesh, sharding), length)


def _lowered(middle: nn.Module, mesh: Mesh, **options: int) -> RankProgram:
    return lower_forward(_program(middle, mesh, **options))


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(LoweringError, match=r"4 attention heads.*choose an sp that divides 4"):
        _lowered(Attention(4), Mesh(sp=8))


def test_tokens_that_do_not_divide_are_refused_with_a_remedy() -> None:
    with pytest.raises(LoweringError, match=r"has 18 tokens.*pad the budget to 20"):
        _lowered(nn.Identity(), Mesh(sp=4), length=18)


def test_other_randomness_under_sequence_parallelism_is_refused_by_name() -> None:
    with pytest.raises(LoweringError, match=r"aten::rrelu in .*middle draws random numbers"):
        _lowered(nn.RReLU(), Mesh(sp=2))
    _lowered(nn.RReLU(), Mesh(dp_shard=2))


def test_a_data_dependent_operator_is_refused_by_name() -> None:
    with pytest.raises(LoweringError, match="aten::masked_select"):
        _lowered(Nonzero(), Mesh(sp=2))


def test_an_operator_without_a_rule_runs_whole_and_is_named() -> None:
    program = _lowered(Median(), Mesh(sp=2))
    assert any("aten::renorm" in note and "middle" in note for note in program.notes)


def test_the_input_program_is_left_alone() -> None:
    program = _program(nn.Identity(), Mesh(sp=2, dp_shard=2))
    code, params = program.gm.code, dict(program.params)
    lowered = lower_forward(program)
    assert program.gm.code == code and program.params == params and not program.done
    assert lowered.gm.code != code and "parameters" in lowered.done


def test_a_parameter_shared_by_blocks_with_different_sharding_is_refused() -> None:
    program = _program(nn.Identity(), Mesh(dp_shard=2))
    program.blocks = {**program.blocks, "other": replace(program.blocks["text"], sharding=Sharding.REPLICATE)}
    (embedding,) = [n for n in program.gm.graph.nodes if n.target is torch.ops.aten.embedding.default]
    with program.gm.graph.inserting_after(embedding):
        twice = program.gm.graph.call_function(torch.ops.aten.embedding.default, embedding.args)
    with program.gm.graph.inserting_after(twice):
        both = program.gm.graph.call_function(torch.ops.aten.add.Tensor, (embedding, twice))
    twice.meta, both.meta = {**embedding.meta, "block": "other"}, dict(embedding.meta)
    embedding.replace_all_uses_with(both, delete_user_cb=lambda user: user is not both)
    with pytest.raises(LoweringError, match=r"tokens\.weight is shared by blocks with different sharding"):
        lower_forward(program)


@pytest.mark.parametrize("sharding", [s for s in Sharding if s is not Sharding.ZERO1])  # that one is priced only
def test_where_gradients_are_reduced(sharding: Sharding) -> None:
    mesh = Mesh(dp_replicate=2, dp_shard=2, sp=2)
    program = lower_forward(_program(nn.Identity(), mesh, sharding=sharding))
    weight = next(spec for spec in program.params.values() if spec.name == "head.weight")
    everywhere = "dp_replicate,dp_shard,sp"
    expected = {
        Sharding.FSDP: ((ShardSpec(everywhere, 0),), ()),
        Sharding.HSDP: ((ShardSpec("dp_shard,sp", 0),), ("dp_replicate",)),
        Sharding.REPLICATE: ((), (everywhere,)),
    }
    assert (weight.shards, weight.reduce_axes) == expected[sharding]


def test_stored_pieces_are_padded_to_equal_size() -> None:
    mesh, full = Mesh(dp_shard=4), torch.arange(12.0).view(6, 2)
    spec = ParamSpec("w", (6, 2), shards=(ShardSpec("dp_shard,sp", 0),))
    pieces = [spec.local_of(full, mesh, rank) for rank in range(4)]
    assert {tuple(p.shape) for p in pieces} == {spec.local_shape(mesh)} == {(2, 2)}
    assert torch.equal(torch.cat(pieces)[:6], full) and not pieces[3].any()


def test_groups_of_ranks() -> None:
    mesh = Mesh(dp_replicate=2, dp_shard=2, sp=2, ep=2)
    assert group_ranks(mesh, "sp", 5) == (4, 5)
    assert group_ranks(mesh, "dp_shard,sp", 5) == (4, 5, 6, 7)
    assert group_ranks(mesh, "dp_replicate", 5) == (1, 5)
    assert group_ranks(mesh, "ep", 2) == (2, 3)
    assert group_ranks(mesh, "ep_rest", 2) == (0, 2)
    assert group_ranks(mesh, "dp_replicate,ep_rest", 3) == (1, 3, 5, 7)
    for axes in ("sp", "ep", "dp_replicate,dp_shard,sp", "dp_replicate,ep_rest"):
        for rank in range(8):
            assert group_ranks(mesh, axes, rank)[axis_coordinate(mesh, axes, rank)] == rank


def test_images_across_ranks_are_refused() -> None:
    program = replace(_program(nn.Identity(), Mesh(sp=2)), aligned={"bounds": 32})
    check_alignment(program, {"bounds": torch.tensor([0, 16, 32, 64])})
    with pytest.raises(InputError, match="an image lies across patch 32"):
        check_alignment(program, {"bounds": torch.tensor([0, 16, 48, 64])})


def test_contracts() -> None:
    check_contracts(FORWARD_PASSES)
    with pytest.raises(ValueError, match="requires"):
        check_contracts(FORWARD_PASSES[-1:])
    with pytest.raises(ValueError, match="must run before"):
        check_contracts([*FORWARD_PASSES, FORWARD_PASSES[0]])
    nothing = Pass("nothing", lambda program, plan: program)
    check_contracts([nothing])
