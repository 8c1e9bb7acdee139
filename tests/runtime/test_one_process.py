"""A plan for one process is executed as it is: recomputing, chunked loss head, compute dtype."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    dense_model,
    make_plan,
    mixture_model,
    reference_gradients,
    run_ranks,
    text_batch,
    worst_error,
)
from torch import nn

from omnicompile.plan import LossHead, Mesh, Plan
from omnicompile.recompute import Recompute
from omnicompile.runtime.parallel_module import ParallelModule
from omnicompile.runtime.parallelize import parallelize
from omnicompile.runtime.plain_module import PlainModule

PLAIN = make_plan(("text",), Mesh())
CHOICES = {
    "recompute": make_plan(("text",), Mesh(), recompute=Recompute.FULL),
    "loss head": replace(PLAIN, loss_head=LossHead.CHUNKED),
    "dtype": replace(PLAIN, param_dtype="bfloat16"),
}


def _operators(module: ParallelModule) -> set[str]:
    (loaded,) = module.engine._programs.values()
    return {str(node.target) for node in loaded.program.gm.graph.nodes if node.op == "call_function"}


def _run(rank: int, world: int, plan: Plan) -> tuple[str, float, float, set[Any], set[str]]:
    model, batch = mixture_model(), text_batch(3)
    module = parallelize(model, plan, "cpu", text_batch(0))
    if isinstance(module, PlainModule):
        return "plain", 0.0, 0.0, set(), set()
    loss = module(**batch).loss
    loss.backward()
    want, gradients = reference_gradients(mixture_model(), [batch])
    got = {name: module.full_gradient(name) for name in gradients}
    kept = {value.dtype for value in module.stored().values()}
    return "parallel", abs(loss.item() - want), worst_error(got, gradients), kept, _operators(module)


def test_the_plain_model_runs_where_that_is_all_that_the_plan_says() -> None:
    assert isinstance(parallelize(dense_model(), PLAIN, "cpu"), PlainModule)
    assert isinstance(parallelize(dense_model(), None, "cpu"), PlainModule)
    half = parallelize(dense_model(), CHOICES["dtype"], "cpu", master_dtype=torch.bfloat16)
    assert isinstance(half, PlainModule)


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES)
def test_one_process_does_what_the_plan_says(choice: str) -> None:
    ((kind, loss_error, worst, kept, operators),) = run_ranks(_run, 1, CHOICES[choice])
    assert kind == "parallel" and kept == {torch.float32}
    if choice == "dtype":
        assert loss_error < 0.02 and 1e-4 < worst < 0.3  # computed in bfloat16, not in float32
    else:
        assert loss_error < 1e-5 and worst < 1e-5
    assert ("chunked" in " ".join(operators)) == (choice == "loss head")


def _stored(rank: int, world: int) -> tuple[set[torch.dtype], float]:
    model = dense_model().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1e-10  # what float32 does not hold
    plan = replace(make_plan(("text",), Mesh()), param_dtype="float64", reduce_dtype="float64")
    module = parallelize(model, plan, "cpu", text_batch(0))
    kept = module.stored()
    return {p.dtype for p in kept.values()}, max(float((kept[n] - p).abs().max()) for n, p in model.named_parameters())


@pytest.mark.slow
def test_a_plan_in_float64_does_not_round_the_weights() -> None:
    assert run_ranks(_stored, 1) == [({torch.float64}, 0.0)]


ALONE = """
import sys
sys.path[:0] = [{tests!r}]
from tiny_models import dense_model, make_plan, text_batch
from omnicompile.plan import Mesh
from omnicompile.recompute import Recompute
from omnicompile.runtime.parallelize import parallelize
plan = make_plan(("text",), Mesh(), recompute=Recompute.FULL)
module = parallelize(dense_model(), plan, "cpu", text_batch(0))
print(type(module).__name__, module(**text_batch(3)).loss.item())
"""


@pytest.mark.slow
def test_no_launcher_is_needed_for_one_process() -> None:
    code = ALONE.format(tests=str(Path(__file__).parent.parent))
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean, check=True)
    name, loss = done.stdout.split()
    assert name == "ParallelModule"
    assert float(loss) == pytest.approx(dense_model()(**text_batch(3)).loss.item(), abs=1e-5)


def _accumulated(module: nn.Module, batches: list[dict[str, Any]]) -> tuple[float, dict[str, torch.Tensor]]:
    assert isinstance(module, PlainModule)
    targets, total = module.count_targets(batches), 0.0
    for number, batch in enumerate(batches):
        with module.accumulate(last=number == len(batches) - 1, targets=targets):
            loss = module(**batch).loss
            loss.backward()
        total += loss.item()
    return total, {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def test_a_micro_batch_without_targets_adds_nothing() -> None:
    empty = text_batch(1) | {"labels": torch.full((1, 32), -100)}
    want = _accumulated(parallelize(dense_model(), None, "cpu"), [text_batch(2), text_batch(3)])
    for place in range(3):
        batches = [text_batch(2), text_batch(3)]
        batches.insert(place, empty)
        loss, gradients = _accumulated(parallelize(dense_model(), None, "cpu"), batches)
        assert loss == want[0] and all(torch.equal(gradients[name], g) for name, g in want[1].items())
    loss, gradients = _accumulated(parallelize(dense_model(), None, "cpu"), [empty, empty])
    assert loss == 0.0 and gradients == {}


def _full_rows(rank: int, world: int) -> list[float]:
    """Differences of losses: rows of one sample alone that fill the budget, through a graph for packed rows."""
    found = []
    for build in (dense_model, mixture_model):
        whole = text_batch(3)
        positions = torch.arange(32)[None]
        example = whole | {"position_ids": torch.cat([positions[:, :20], positions[:, :12]], 1)}
        module = parallelize(build(), CHOICES["recompute"], "cpu", example)
        for batch in (whole | {"position_ids": positions}, example):
            found.append((module(**batch).loss - build()(**batch).loss).abs().item())
    return found


@pytest.mark.slow
def test_a_sample_that_fills_its_row_has_its_loss() -> None:
    (differences,) = run_ranks(_full_rows, 1)
    assert len(differences) == 4 and max(differences) < 1e-5
