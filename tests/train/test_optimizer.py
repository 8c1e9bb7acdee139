"""Optimizers over shards equal those over whole parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import dense_model, make_plan, run_ranks, text_batch, vision_language_model
from torch import nn

import omnicompile
from omnicompile.errors import InputError
from omnicompile.plan import Mesh, Sharding
from omnicompile.train import OptimizerKind, OptimizerOptions, freeze, make_optimizer, train_step
from omnicompile.train.muon import Muon, orthogonalized

MUON = OptimizerOptions(OptimizerKind.MUON, lr=0.01)


def test_orthogonalized_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((24, 8), (8, 24), (16, 16)):
        update = torch.randn(shape)
        found = orthogonalized(update) / (0.2 * max(shape) ** 0.5)
        values = torch.linalg.svdvals(found.float())
        assert values.min() > 0.3
        assert values.max() < 1.4
        assert torch.nn.functional.cosine_similarity(found.flatten(), update.flatten(), 0) > 0.5


def test_muon_of_one_process_is_torchs() -> None:
    ours, theirs = nn.Linear(12, 20, bias=False), nn.Linear(12, 20, bias=False)
    theirs.load_state_dict(ours.state_dict())
    mine = make_optimizer(ours, MUON)
    reference = torch.optim.Muon(
        theirs.parameters(), lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    assert isinstance(mine, Muon)
    for seed in range(5):
        torch.manual_seed(seed)
        ours.weight.grad = torch.randn(20, 12)
        theirs.weight.grad = ours.weight.grad.clone()
        mine.step()
        reference.step()
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-6)


def test_muon_leaves_embeddings_heads_and_vectors_to_adamw() -> None:
    model = vision_language_model()
    optimizer = make_optimizer(model, MUON)
    names = {id(value): name for name, value in model.named_parameters()}
    matrices = {names[id(p)] for g in optimizer.param_groups if g["muon"] for p in g["params"]}
    others = {names[id(p)] for g in optimizer.param_groups if not g["muon"] for p in g["params"]}
    assert "model.language_model.layers.0.mlp.up_proj.weight" in matrices
    assert "model.visual.blocks.0.attn.qkv.weight" in matrices
    assert {"lm_head.weight", "model.language_model.embed_tokens.weight"} <= others
    assert all(not name.endswith("bias") for name in matrices)
    assert matrices | others == set(names.values())


def test_norms_and_biases_do_not_decay() -> None:
    model = vision_language_model()
    optimizer = make_optimizer(model, OptimizerOptions(weight_decay=0.3))
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, value in model.named_parameters():
        assert decays[id(value)] == (0.3 if value.dim() > 1 else 0.0), name


def test_frozen_parameters_are_not_optimized_and_nothing_is_refused() -> None:
    model = vision_language_model()
    frozen = set(freeze(model, ["model.visual"]))
    optimizer = make_optimizer(model)
    known = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert all((id(value) in known) == (name not in frozen) for name, value in model.named_parameters())
    for value in model.parameters():
        value.requires_grad_(False)
    with pytest.raises(InputError, match="nothing to train"):
        make_optimizer(model)
    with pytest.raises(InputError, match="nothing to do"):
        make_optimizer(nn.Embedding(4, 4), MUON)


def _train(rank: int, world: int, options: OptimizerOptions, mesh: Mesh) -> tuple[list[float], dict[str, torch.Tensor]]:
    plan = make_plan(("text",), mesh, Sharding.HSDP)
    module = omnicompile.parallelize(dense_model(), plan, "cpu", example_batch=text_batch(0), backend="eager")
    return _losses(module, options, [text_batch(rank // mesh.sp)])


def _losses(module: Any, options: OptimizerOptions, micro: list[Any]) -> tuple[list[float], dict[str, torch.Tensor]]:
    optimizer = make_optimizer(module, options)
    losses = [train_step(module, optimizer, micro).loss for _ in range(6)]
    whole = {n: v.full_tensor() if hasattr(v, "full_tensor") else v for n, v in module.state_dict().items()}
    return losses, {name: value.clone() for name, value in whole.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tolerance"), [(OptimizerKind.ADAMW, 1e-5), (OptimizerKind.MUON, 2e-3)])
def test_two_ranks_train_as_one(kind: OptimizerKind, tolerance: float) -> None:
    """Muon's iteration runs in bfloat16, which turns the last bits of a gradient into more."""
    options = OptimizerOptions(kind, lr=0.01)
    found = run_ranks(_train, 2, options, Mesh(dp_shard=2))
    plain = omnicompile.parallelize(dense_model(), None, "cpu")
    want, weights = _losses(plain, options, [text_batch(0), text_batch(1)])
    assert want[-1] < want[0] - 0.1
    for losses, whole in found:
        assert losses == pytest.approx(want, abs=tolerance)
        for name, value in weights.items():
            assert torch.allclose(whole[name], value, atol=0.02 if kind is OptimizerKind.MUON else 1e-4), name
