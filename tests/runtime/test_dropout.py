"""Two gloo processes drop what one process drops on the joined batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import make_plan, run_ranks, text_batch, worst_error
from torch import Tensor, nn

from omnicompile.passes.dropout import KeyedDropout
from omnicompile.plan import Mesh
from omnicompile.recompute import Recompute
from omnicompile.runtime.parallel_module import ParallelModule
from omnicompile.runtime.parallelize import parallelize

CASES = {
    "fsdp recomputed": (Mesh(dp_shard=2), "step", Recompute.FULL),
    "sp recomputed": (Mesh(sp=2), "step", Recompute.FULL),
    "sp eager": (Mesh(sp=2), "eager", Recompute.NONE),
    "sp compiled": (Mesh(sp=2), "inductor", Recompute.SELECTIVE),
}


def dropping_model() -> nn.Module:
    """Dropout after the embeddings and in every residual branch."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64, embd_pdrop=0.2, resid_pdrop=0.1, attn_pdrop=0.0,
        use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).float().train()


def batch_of(seed: int) -> dict[str, Tensor]:
    return text_batch(seed, rows=2)


def compare(
    model: nn.Module, module: ParallelModule, batches: list[dict[str, Tensor]], mine: int
) -> tuple[float, float, float]:
    """(loss of the ranks, its difference from one process, worst error of a gradient)"""
    state = torch.get_rng_state()
    module.zero_grad()
    loss = module(**batches[mine]).loss
    loss.backward()
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    seed = torch.randint(torch.iinfo(torch.int64).max, (1,))
    assert torch.equal(torch.get_rng_state(), after)  # a forward draws one number, on every rank
    torch.distributed.broadcast(seed, 0)
    model.zero_grad()
    with KeyedDropout(int(seed)):
        want = model(**{name: torch.cat([b[name] for b in batches]) for name in batches[0]}).loss
    want.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    got = {name: module.full_gradient(name) for name in gradients}
    return loss.item(), abs(loss.item() - want.item()), worst_error(got, gradients)


def everything(rank: int, world: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (mesh, backend, recompute) in CASES.items():
        model = dropping_model()
        plan = make_plan(("text",), mesh, recompute=recompute)
        ranks, mine = mesh.data_ranks, rank // mesh.sp
        module = parallelize(model, plan, "cpu", batch_of(0), backend)
        assert isinstance(module, ParallelModule)
        torch.manual_seed(7 + rank)
        batches = [batch_of(i) for i in range(ranks)]
        steps = [compare(model, module, batches, mine) for _ in range(2)]
        module.eval(), model.eval()
        with torch.no_grad():
            joined = {key: torch.cat([b[key] for b in batches]) for key in batches[0]}
            evaluated = abs(module(**batches[mine]).loss.item() - model(**joined).loss.item())
        found[name] = {"steps": steps, "evaluated": evaluated, "programs": len(module.engine._programs)}
    return found


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_ranks(everything, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_drop_as_one(results: list[dict[str, Any]], name: str) -> None:
    for found in results:
        first, second = found[name]["steps"]
        assert first[0] != second[0]  # the same batch, other elements dropped
        assert max(first[1], second[1]) < 1e-5 and max(first[2], second[2]) < 1e-5
        assert found[name]["evaluated"] < 1e-5
        assert found[name]["programs"] == 2  # in training and in evaluation: none for a new seed


@pytest.mark.slow
def test_layouts_give_the_same_losses(results: list[dict[str, Any]]) -> None:
    losses = [results[0][name]["steps"][0][0] for name, (mesh, *_) in CASES.items() if mesh.sp == 2]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)
