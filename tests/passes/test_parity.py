"""Lowered models equal the single-process ones: loss and every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from omnicompile.plan import Layout, Mesh, Sharding

from .models import (
    block_plans,
    dense_model,
    image_batches,
    latent_mixture_model,
    mixture_model,
    stacked_mixture_vl_model,
    text_batch,
    vision_language_model,
    windowed_model,
)
from .parity import Parity, run_parity

TOLERANCE = 1e-5


def _check(result: Parity) -> None:
    name, worst = result.worst
    assert result.loss_error < TOLERANCE
    assert worst < TOLERANCE, f"{name}: {worst:.1e}"


def _text(model: nn.Module, mesh: Mesh, sharding: Sharding = Sharding.FSDP, rows: int = 1) -> Parity:
    batches = [text_batch(seed, rows=rows) for seed in range(mesh.data_ranks)]
    result = run_parity(model, batches, mesh, block_plans(mesh, sharding))
    _check(result)
    return result


def _vision(model: nn.Module, mesh: Mesh, layout: Layout, sharding: Sharding = Sharding.FSDP) -> Parity:
    result = run_parity(model, image_batches(mesh.data_ranks), mesh, block_plans(mesh, sharding, layout))
    _check(result)
    return result


def test_experts_sequence_and_data_parallel_together() -> None:
    result = _text(mixture_model(), Mesh(dp_shard=2, sp=2, ep=2))
    text = result.program.gm.code
    assert text.count("expert_ops_dispatch(") == 2 and text.count("collectives_all_to_all(") == 8


def test_sequence_parallel_vision_and_text() -> None:
    _vision(vision_language_model(), Mesh(dp_shard=2, sp=2), Layout.SEQUENCE)


def test_replicated_vision_feeds_a_cut_sequence() -> None:
    result = _vision(vision_language_model(), Mesh(sp=2), Layout.REPLICATED)
    assert "all_gather(" not in result.program.gm.code


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [Mesh(sp=2), Mesh(dp_shard=2), Mesh(dp_shard=2, ep=2), Mesh(sp=4), Mesh(dp_shard=2, sp=2, ep=4), Mesh(sp=4, ep=4),
     Mesh(dp_replicate=2, dp_shard=2, sp=2, ep=2)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("model", [mixture_model, latent_mixture_model, dense_model])
def test_text_models(model: Callable[[], nn.Module], mesh: Mesh) -> None:
    _text(model(), mesh)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", list(Sharding))
def test_shardings(sharding: Sharding) -> None:
    _text(mixture_model(), Mesh(dp_replicate=2, dp_shard=2, sp=2, ep=2), sharding)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout.REPLICATED, Layout.SEQUENCE])
@pytest.mark.parametrize("mesh", [Mesh(sp=2), Mesh(sp=4), Mesh(dp_shard=2, sp=2)], ids=str)
@pytest.mark.parametrize("model", [vision_language_model, windowed_model, stacked_mixture_vl_model])
def test_vision_models(model: Callable[[], nn.Module], mesh: Mesh, layout: Layout) -> None:
    _vision(model(), mesh, layout)


@pytest.mark.slow
def test_key_heads_fewer_than_ranks() -> None:
    _text(dense_model(kv_heads=1), Mesh(sp=4))


@pytest.mark.slow
def test_tied_weights_and_several_rows() -> None:
    _text(dense_model(tied=True), Mesh(dp_shard=2, sp=2), rows=2)
