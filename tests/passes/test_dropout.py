"""Dropout by place: the generator, its statistics, and parity of models with dropout on any layout."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omnicompile.cluster import Cluster
from omnicompile.errors import LoweringError
from omnicompile.lowering.proof import prove
from omnicompile.lowering.regions import compile_regions
from omnicompile.lowering.step_graph import trace_step
from omnicompile.lowering.tiny import TinyModel
from omnicompile.passes import lower_forward
from omnicompile.passes.dropout_op import dropout, dropout_expanded, philox, site_keys, uniform
from omnicompile.passes.rank_program import RankProgram
from omnicompile.passes.verifier import verify_lowering
from omnicompile.plan import BlockPlan, Layout, Mesh, Plan, Sharding
from omnicompile.workload import Workload

from .models import block_plans, text_batch
from .parity import captured_for, program_of, run_parity, shifted_targets, whole_values
from .plain_models import PlainModel, speech_batch, speech_model

KEY = site_keys(3, 1)[0]


def kept(count: int, key: Tensor = KEY, data_rank: int = 0, p: float = 0.1) -> Tensor:
    return dropout(torch.ones(count), key, torch.tensor(data_rank), None, p, 1, 1) != 0


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [
        ((0, 0), 0, (0xFF1DAE59, 0x6CD10DF2)),
        ((0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFF, (0x2C3F628B, 0xAB4FD7AD)),
        ((0x243F6A88, 0x85A308D3), 0x13198A2E, (0xDD7CE038, 0xF62A4C12)),
    ],
)
def test_the_generator_gives_the_known_answers(counter: tuple[int, int], key: int, want: tuple[int, int]) -> None:
    """Known answers of the authors' library (Random123, kat_vectors)."""
    low, high = philox(torch.tensor(counter[0]), torch.tensor(counter[1]), torch.tensor(key))
    assert (int(low), int(high)) == want


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_rate_and_scale(p: float) -> None:
    count = 1 << 20
    y = dropout(torch.ones(count), KEY, None, None, p, 1, 1)
    dropped = (y == 0).double().mean().item()
    assert abs(dropped - p) < 4 * (p * (1 - p) / count) ** 0.5
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / (1 - p)))


def test_everything_and_nothing() -> None:
    x = torch.randn(64)
    assert torch.equal(dropout(x, KEY, None, None, 1.0, 1, 1), torch.zeros(64))
    assert torch.equal(dropout(x, KEY, None, None, 0.0, 1, 1), x)


def test_sites_steps_ranks_and_neighbours_are_independent() -> None:
    """Correlations of the masks are within four standard deviations of 0."""
    count = 1 << 20
    keys = [*site_keys(0, 3), *site_keys(1, 2), *site_keys(1 << 40, 1)]
    masks = [kept(count, key, p=0.5) for key in keys] + [kept(count, keys[0], 1, 0.5)]
    signs = [mask.double() * 2 - 1 for mask in masks]
    signs += [signs[0].roll(shift) for shift in (1, 2, 64, 4096)]
    for one, other in itertools.combinations(signs, 2):
        assert abs((one * other).mean().item()) < 4 / count**0.5
    rows = masks[0].double().view(1024, 1024).mean(1)
    assert abs(rows.std().item() * 2 * 32 - 1) < 0.1  # rows differ as much as by chance


def test_a_micro_batch_continues_where_the_one_before_ends() -> None:
    assert torch.equal(torch.cat([kept(96, data_rank=r) for r in range(3)]), kept(288))


def test_the_backward_drops_the_same_elements_and_the_expansion_too() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    arguments = (KEY, torch.tensor(2), torch.tensor(1), 0.5, 3, 4)
    y = dropout(x, *arguments)
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad * x, y)
    assert torch.equal(dropout_expanded(x, *arguments), y)
    torch.library.opcheck(torch.ops.omnicompile.dropout.default, (x, *arguments))


# Models --------------------------------------------------------------------------------------------------------------


class Dropping(nn.Module):
    """A hand-written decoder with dropout after the embedding, of whole channels, and before the head."""

    def __init__(self, p: float = 0.3, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.p = PlainModel(layers), p
        self.inner.tokens.register_forward_hook(self._drop)
        for layer in self.inner.layers:
            layer.register_forward_hook(self._drop)
        self.inner.norm.register_forward_hook(lambda module, args, x: nn.functional.dropout1d(x, p, self.training))

    def _drop(self, module: nn.Module, args: Any, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.p, self.training)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        return self.inner(input_ids, labels)


class Drawing(nn.Module):
    """Random depth in three ways of writing it, and noise, on [batch, s, h]."""

    def forward(self, x: Tensor) -> Tensor:
        ones = (x.shape[0], 1, 1)
        x = x + x.sin() * (0.7 + torch.rand(ones, dtype=x.dtype, device=x.device)).floor_()
        x = x + x.cos() * x.new_empty(ones).bernoulli_(0.6)
        x = x * torch.bernoulli(torch.full_like(x, 0.9))
        return x * torch.rand_like(x) + x * torch.empty_like(x).uniform_(0.9, 1.1)


def joined(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


MESHES = [Mesh(dp_shard=2), Mesh(sp=2), Mesh(sp=4), Mesh(dp_replicate=2, dp_shard=2), Mesh(dp_shard=2, sp=2)]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_loss_and_gradients_are_those_of_one_process(mesh: Mesh) -> None:
    batches = [text_batch(seed, rows=2) for seed in range(mesh.data_ranks)]
    sharding = Sharding.HSDP if mesh.dp_replicate > 1 else Sharding.FSDP
    result = run_parity(Dropping().double().train(), batches, mesh, block_plans(mesh, sharding), joined(batches))
    assert result.program.gm.code.count("omnicompile.dropout.default") == 4
    assert result.loss_error < 1e-9 and result.worst[1] < 1e-9


@pytest.mark.parametrize("mesh", [Mesh(dp_shard=2, sp=2)], ids=str)
def test_random_depth_and_noise_are_those_of_one_process(mesh: Mesh) -> None:
    model = PlainModel().double().train()
    model.layers.append(Drawing())
    batches = [text_batch(seed, rows=2) for seed in range(mesh.data_ranks)]
    result = run_parity(model, batches, mesh, block_plans(mesh), joined(batches))
    assert result.program.gm.code.count("omnicompile.uniform.default") == 5
    assert result.loss_error < 1e-9 and result.worst[1] < 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_uniform_numbers(dtype: torch.dtype) -> None:
    count = 1 << 20
    x = uniform(torch.zeros(count, dtype=dtype), KEY, None, None, 1, 1)
    assert x.dtype == dtype and x.min() >= 0 and x.max() < 1
    edges = torch.histc(x.float(), 8, 0, 1) / count
    assert (edges - 1 / 8).abs().max() < 4 * (7 / 64 / count) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout.REPLICATED, Layout.SEQUENCE])
def test_an_encoder_with_dropout(layout: Layout) -> None:
    mesh = Mesh(dp_shard=2, sp=2)
    model = speech_model().double()
    for module in model.modules():
        if isinstance(module.__dict__.get("dropout"), float) and not hasattr(module, "k_proj"):
            module.dropout = 0.2
    batches = [
        {k: v.double() if v.is_floating_point() else v for k, v in speech_batch(seed).items()} for seed in range(2)
    ]
    blocks = block_plans(mesh, vision=layout, vision_name="encoder")
    result = run_parity(model, batches, mesh, blocks, joined(batches), shift=0)
    assert result.program.gm.code.count("omnicompile.dropout.default") == 12
    assert result.loss_error < 1e-9 and result.worst[1] < 1e-9


def lowered(model: nn.Module, mesh: Mesh) -> tuple[RankProgram, RankProgram, dict[str, Tensor]]:
    batch = text_batch(0)
    captured, inputs = captured_for(model, batch)
    original = program_of(captured, model, mesh, block_plans(mesh), 32)
    return original, lower_forward(original), whole_values(original, captured, model) | inputs.prepare(batch)


def test_every_value_holds_its_placement() -> None:
    original, program, values = lowered(Dropping().train(), Mesh(dp_shard=2, sp=2))
    report = verify_lowering(original, program, values, shifted_targets(text_batch(0)))
    assert report.worst[1] < 1e-5


def test_the_number_of_compilations_does_not_grow_with_the_number_of_sites() -> None:
    counts = []
    for layers in (4, 6):  # with fewer, none is both after a layer and before one
        _, program, _ = lowered(Dropping(layers=layers).train(), Mesh(dp_shard=2, sp=2))
        counts.append(compile_regions(trace_step(program).gm, lambda module, dynamic: module)[1])
    assert counts[0] == counts[1]


def test_evaluation_drops_nothing() -> None:
    _, program, _ = lowered(Dropping().eval(), Mesh(sp=2))
    assert "dropout_key" not in program.gm.code and "omnicompile.dropout" not in program.gm.code


class AttentionDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q = x.view(1, -1, 4, 8).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.1).transpose(1, 2).reshape(x.shape)


def test_attention_dropout_is_refused_by_name() -> None:
    model = Dropping().train()
    model.inner.layers.append(AttentionDropout())
    with pytest.raises(LoweringError, match=r"layers.2 has attention dropout.*set .* to 0"):
        lowered(model, Mesh(dp_shard=2))


def test_a_proof_takes_a_model_with_dropout() -> None:
    mesh = Mesh(dp_shard=2, sp=2)
    plan = Plan("m", Cluster(gpus=4), Workload(), mesh, {"text": BlockPlan(layout=Layout.SEQUENCE, sp=2)})
    report = prove(TinyModel(Dropping().train(), lambda rank: text_batch(rank)), plan)
    assert report.equal, (report.worst, report.verdict)
