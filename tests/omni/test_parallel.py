"""Omni models under plans give what one process gives; ranks may lack any modality."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from omni_models import MODELS, batch, tiny
from tiny_models import make_plan, run_ranks, worst_error
from torch import Tensor

import omnicompile
from omnicompile.lowering.proof import prove
from omnicompile.lowering.tiny import TinyModel
from omnicompile.plan import Layout, Mesh, Sharding
from omnicompile.runtime.budget import Budget

LENGTH = 128
LACKS = ({}, {"read": False, "heard": False}, {"produced": False}, {"read": False, "heard": False, "produced": False})


def example(name: str) -> dict[str, Tensor]:
    """A batch of the budget's size, with an item of every kind."""
    model = tiny(name)
    return Budget(LENGTH, None, restarts=True).fill(batch(model, 99)).batch


@pytest.mark.parametrize("lacks", LACKS)
@pytest.mark.parametrize("name", MODELS[:2])
def test_a_filled_batch_has_the_same_losses(name: str, lacks: dict[str, bool]) -> None:
    model = tiny(name)
    given = batch(model, 3, **dict.fromkeys(lacks, False))
    filled = Budget.of(model, example(name)).fill(given).batch
    assert {n: v.shape for n, v in filled.items() if "thw" not in n} == {
        n: v.shape for n, v in example(name).items() if "thw" not in n
    }
    want, got = model(**given), model(**filled)
    for part, loss in want.losses.items():
        torch.testing.assert_close(got.losses[part], loss)
    torch.testing.assert_close(got.loss, want.loss)


PLANS = [
    ("janus_tiny", Mesh(dp_shard=2), {}),
    ("janus_tiny", Mesh(sp=2), {"vision": {"layout": Layout.IMAGES}, "output_image": {"layout": Layout.REPLICATED}}),
    (
        "janus_tiny",
        Mesh(dp_shard=2, sp=2),
        {
            "vision": {"layout": Layout.REPLICATED, "sharding": Sharding.REPLICATE},
            "output_image": {"layout": Layout.IMAGES},
        },
    ),
    ("llama_omni_tiny", Mesh(dp_shard=2), {"vision": {"sharding": Sharding.REPLICATE}}),
    ("llama_omni_tiny", Mesh(sp=2), {"vision": {"layout": Layout.REPLICATED}, "audio": {"layout": Layout.IMAGES}}),
    ("llama_omni_tiny", Mesh(dp_shard=2, sp=2), {"audio": {"layout": Layout.REPLICATED}}),
    ("qwen3_moe_omni_tiny", Mesh(dp_shard=2), {}),
    ("qwen3_moe_omni_tiny", Mesh(sp=2), {"audio": {"layout": Layout.REPLICATED}}),
    ("qwen3_moe_omni_tiny", Mesh(sp=2, ep=2), {"vision": {"layout": Layout.REPLICATED}}),
    ("qwen3_moe_omni_tiny", Mesh(dp_shard=2, sp=2, ep=2), {"output_image": {"layout": Layout.REPLICATED}}),
    ("qwen3_moe_omni_tiny", Mesh(dp_replicate=2, dp_shard=2, ep=2), {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mesh", "choices"), PLANS)
def test_every_gradient_is_that_of_one_process(name: str, mesh: Mesh, choices: dict[str, Any]) -> None:
    model = tiny(name).double()
    model.set_experts_implementation("eager")  # the grouped product takes no float64
    budget = Budget.of(model, example(name))
    blocks = ("text", "vision", "output_image", *(["audio"] if "audio" in model.config.encoders else []))
    plan = make_plan(blocks, mesh)
    own = {
        b: dataclasses.replace(p, ep=1 if b != "text" else p.ep, **choices.get(b, {})) for b, p in plan.blocks.items()
    }
    plan = dataclasses.replace(plan, blocks=own)
    report = prove(TinyModel(model, lambda rank: in_double(budget.fill(batch(model, rank)).batch)), plan)
    assert report.equal, (report.loss_error, report.worst, report.verdict)


def in_double(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() if value.is_floating_point() else value for name, value in given.items()}


def ranks_that_lack(rank: int, world: int, name: str, sp: int) -> dict[str, Any]:
    model = tiny(name)
    blocks = ("text", "vision", "output_image", *(["audio"] if "audio" in model.config.encoders else []))
    ep = 2 if "moe" in name else 1
    plan = make_plan(blocks, Mesh(dp_shard=world // sp, sp=sp, ep=ep))
    module = omnicompile.parallelize(model, plan, "cpu", example_batch=example(name))
    output = module(**batch(model, rank // sp, **kinds_of(rank // sp)))
    output.loss.backward()
    grads = {n: module.full_gradient(n) for n, p in model.named_parameters() if p.requires_grad}
    return {"loss": output.loss.item(), "losses": {n: v.item() for n, v in output.losses.items()}, "grads": grads}


def kinds_of(group: int) -> dict[str, bool]:
    """The second group has neither pictures nor sounds."""
    return dict.fromkeys(LACKS[3], False) if group else {}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sp"), [("janus_tiny", 1), ("llama_omni_tiny", 2), ("qwen3_moe_omni_tiny", 1)])
def test_two_processes_one_without_any_item(name: str, sp: int) -> None:
    results = run_ranks(ranks_that_lack, 2, name, sp)
    model = tiny(name)
    groups = 2 // sp
    batches = [batch(model, group, **kinds_of(group)) for group in range(groups)]
    counts = [counted(model, given) for given in batches]
    losses = dict.fromkeys(counts[0], 0.0)
    for given, count in zip(batches, counts):
        output = model(**given)
        shares = {n: loss * count[n] / sum(c[n] for c in counts) for n, loss in output.losses.items() if count[n]}
        sum(shares.values()).backward()
        losses = {n: v + (shares[n].item() if n in shares else 0.0) for n, v in losses.items()}
    want = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for got in results:
        assert got["losses"] == pytest.approx(losses, rel=1e-5)
        assert got["loss"] == pytest.approx(sum(losses.values()), rel=1e-5)
        # The gradient of the bias of a key is zero, but for rounding.
        some = {n: g for n, g in want.items() if not n.endswith("k_proj.bias")}
        assert worst_error({n: got["grads"][n] for n in some}, some) < 1e-5


def counted(model: Any, given: dict[str, Tensor]) -> dict[str, int]:
    labels, token = given["labels"], model.config.decoder("image").token_id
    drawn = int((labels == token).sum())
    return {"text": int((labels[:, 1:] != -100).sum()) - drawn, "image": drawn}
