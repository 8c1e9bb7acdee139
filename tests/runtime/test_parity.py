"""Two gloo processes train as one process does: losses, gradients, optimizer steps, logits, state dicts."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tiny_models import (
    image_batch,
    make_plan,
    mixture_model,
    reference_gradients,
    run_ranks,
    text_batch,
    vision_language_model,
    worst_error,
)
from torch import Tensor, nn

from omnicompile.plan import Mesh, Sharding
from omnicompile.runtime.parallel_module import ParallelModule
from omnicompile.runtime.parallelize import parallelize

GRIDS = [[(1, 4, 8), (1, 8, 8)], [(1, 6, 16)], [(1, 8, 4), (1, 4, 8), (1, 4, 8)], [(1, 2, 2), (1, 2, 46)]]
SMALL = [[(1, 4, 4)], None, [(1, 6, 12)], [(1, 2, 2), (1, 2, 4)]]
VLM = ("vlm", ("text", "vision"))
MOE = ("moe", ("text",))
MOE_AUX = ("moe_aux", ("text",))

CASES: dict[str, tuple[tuple[str, tuple[str, ...]], Mesh, Sharding]] = {
    "vlm fsdp": (VLM, Mesh(dp_shard=2), Sharding.FSDP),
    "vlm hsdp": (VLM, Mesh(dp_replicate=2), Sharding.HSDP),
    "vlm sp": (VLM, Mesh(sp=2), Sharding.FSDP),
    "moe replicate": (MOE, Mesh(dp_shard=2), Sharding.REPLICATE),
    "moe ep": (MOE, Mesh(dp_shard=2, ep=2), Sharding.FSDP),
    "moe sp ep": (MOE_AUX, Mesh(sp=2, ep=2), Sharding.FSDP),
}


def build(kind: str) -> nn.Module:
    return vision_language_model() if kind == "vlm" else mixture_model(aux=kind == "moe_aux")


def full_batch(kind: str, seed: int) -> dict[str, Tensor]:
    return image_batch(seed, GRIDS[seed % 4]) if kind == "vlm" else text_batch(seed)


def small_batch(seed: int) -> dict[str, Tensor]:
    """Less than the budget; every second one has no image."""
    grids = SMALL[seed % 4]
    return text_batch(seed, 39) if grids is None else image_batch(seed, grids, 36)


def distribute(name: str, rank: int) -> tuple[nn.Module, ParallelModule, Mesh, str]:
    (kind, blocks), mesh, sharding = CASES[name]
    model = build(kind)
    module = parallelize(model, make_plan(blocks, mesh, sharding), "cpu", full_batch(kind, 0))
    assert isinstance(module, ParallelModule)
    return model, module, mesh, kind


def compare(
    model: nn.Module, module: ParallelModule, batches: list[dict[str, Tensor]], mine: int
) -> tuple[float, float]:
    """(difference of the losses, worst error of a gradient)"""
    module.zero_grad()
    loss = module(**batches[mine]).loss
    loss.backward()
    want, gradients = reference_gradients(model, batches)
    got = {name: module.full_gradient(name) for name in gradients}
    return abs(loss.item() - want), worst_error(got, gradients)


def gradients_of(rank: int, name: str) -> list[tuple[float, float]]:
    """Two batches with different grids, one after the other."""
    model, module, mesh, kind = distribute(name, rank)
    ranks, mine = mesh.data_ranks, rank // mesh.sp
    return [compare(model, module, [full_batch(kind, i + k) for i in range(ranks)], mine) for k in (0, ranks)]


def captures_with_small_batches(rank: int) -> dict[str, Any]:
    model, module, _, _ = distribute("vlm fsdp", rank)
    errors = [compare(model, module, [small_batch(i + k) for i in range(2)], rank) for k in (0, 2)]
    return {"errors": errors, "captures": len(module.engine._captures)}


def trained_losses(rank: int) -> dict[str, list[float]]:
    """Five AdamW steps with clipping, two micro-steps each, next to one process."""
    _, module, _, kind = distribute("vlm hsdp", rank)
    reference = build(kind)
    ours = torch.optim.AdamW(module.parameters(), lr=1e-2)
    theirs = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    losses: dict[str, list[float]] = {"ours": [], "theirs": []}
    for step in range(5):
        micro = [[full_batch(kind, 4 * step + 2 * k + i) for i in range(2)] for k in range(2)]
        targets = module.count_targets([batches[rank] for batches in micro])
        total = 0.0
        for k, batches in enumerate(micro):
            with module.accumulate(last=k == 1, targets=targets):
                loss = module(**batches[rank]).loss
                loss.backward()
            total += loss.item()
        ours_norm = module.clip_grad_norm_(0.5)
        want, _ = reference_gradients(reference, [b for batches in micro for b in batches])
        theirs_norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        assert abs(ours_norm.item() - theirs_norm.item()) < 1e-4 * theirs_norm.item()
        ours.step(), theirs.step()
        ours.zero_grad(), theirs.zero_grad()
        losses["ours"].append(total)
        losses["theirs"].append(want)
    return losses


def evaluation(rank: int) -> dict[str, float]:
    """eval() under no_grad: logits with and without labels; the state dict restores another module."""
    model, module, _, kind = distribute("vlm sp", rank)
    batch = full_batch(kind, 0)
    result: dict[str, float] = {}
    result["train logits"] = (module(**batch).logits - model(**batch).logits).abs().max().item()
    module.eval(), model.eval()
    with torch.no_grad():
        want = model(**batch)
        result["loss"] = abs(module(**batch).loss.item() - want.loss.item())
        unlabelled = {k: v for k, v in batch.items() if k != "labels"}
        result["logits"] = (module(**unlabelled).logits - want.logits).abs().max().item()
    state = module.state_dict()
    own = dict(model.named_parameters())
    assert set(state) == set(own)
    result["state"] = max((state[n].full_tensor() - own[n]).abs().max().item() for n in own)
    saved = {name: value.full_tensor().numpy().copy() for name, value in state.items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    module.load_state_dict({name: torch.from_numpy(value) for name, value in saved.items()})
    result["restored"] = max((v.full_tensor() - own[n]).abs().max().item() for n, v in module.state_dict().items())
    return result


def disagreements(rank: int) -> dict[str, str]:
    """What each rank is told when ranks differ."""
    messages = {}
    plan = make_plan(("text",), Mesh(dp_shard=2), Sharding.FSDP if rank else Sharding.REPLICATE)
    try:
        parallelize(mixture_model(), plan, "cpu", text_batch(0))
    except Exception as error:
        messages["plan"] = f"{type(error).__name__}: {error}"
    module = parallelize(mixture_model(), make_plan(("text",), Mesh(dp_shard=2)), "cpu", text_batch(0))
    try:
        module(**text_batch(0, rows=1 + rank))
    except Exception as error:
        messages["batch"] = f"{type(error).__name__}: {error}"
    try:
        module(**text_batch(0, length=32 + 8 * rank))
    except Exception as error:
        messages["too long"] = f"{type(error).__name__}: {error}"
    return messages


def everything(rank: int, world: int) -> dict[str, Any]:
    found: dict[str, Any] = {f"gradients {name}": gradients_of(rank, name) for name in CASES}
    parts = (captures_with_small_batches, trained_losses, evaluation, disagreements)
    return found | {part.__name__: partial(part, rank)() for part in parts}


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    """By rank. One pair of processes runs everything, because starting processes costs more than the work."""
    return run_ranks(everything, 2)


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", CASES)
def test_loss_and_every_gradient_equal_one_process(results: list[dict[str, Any]], name: str) -> None:
    for found in results:
        for loss, gradient in found[f"gradients {name}"]:
            assert loss < 1e-5
            assert gradient < 1e-5


def test_batches_below_the_budget_and_ranks_without_images_use_the_same_graph(results: list[dict[str, Any]]) -> None:
    for found in results:
        part = found["captures_with_small_batches"]
        assert part["captures"] == 1
        for loss, gradient in part["errors"]:
            assert loss < 1e-5
            assert gradient < 1e-5


def test_five_steps_with_accumulation_and_clipping_equal_one_process(results: list[dict[str, Any]]) -> None:
    for found in results:
        losses = found["trained_losses"]
        assert losses["ours"] == pytest.approx(losses["theirs"], rel=1e-4)
        assert losses["ours"][-1] < losses["ours"][0]


def test_evaluation_logits_and_state_dict(results: list[dict[str, Any]]) -> None:
    for found in results:
        for what, error in found["evaluation"].items():
            assert error < 1e-5, what


def test_ranks_that_disagree_end_with_the_cause(results: list[dict[str, Any]]) -> None:
    for found in results:
        messages = found["disagreements"]
        assert "ranks disagree on the plan" in messages["plan"]
        assert "replicate" in messages["plan"] and "fsdp" in messages["plan"]
        assert "ranks disagree on the shapes of the batch" in messages["batch"]
    assert "longer than the budget" in results[1]["disagreements"]["too long"]
    assert "rank 1 could not prepare its batch" in results[0]["disagreements"]["too long"]
