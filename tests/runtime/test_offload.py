"""Plans that keep activations or the optimizer in host memory train as plans without."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_plan, mixture_model, run_ranks, text_batch, vision_language_model
from torch import Tensor

from omnicompile.checkpoint import Checkpointer
from omnicompile.errors import PlanError
from omnicompile.plan import Mesh, Plan, Sharding
from omnicompile.recompute import Recompute
from omnicompile.runtime.offload import HostStore
from omnicompile.runtime.parallel_module import ParallelModule
from omnicompile.runtime.parallelize import parallelize

STEPS = 3


def distributed(plan: Plan, backend: str = "step", kind: str = "moe") -> ParallelModule:
    model = mixture_model() if kind == "moe" else vision_language_model()
    module = parallelize(model, plan, "cpu", text_batch(0), backend=backend)
    assert isinstance(module, ParallelModule)
    return module


def optimizer_of(module: ParallelModule) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-2, fused=True)


def train(module: ParallelModule, optimizer: torch.optim.Optimizer, rank: int, micro: int = 1) -> list[float]:
    """Losses of every micro-step, and norms of the gradients, of a few optimizer steps."""
    found = []
    for step in range(STEPS):
        batches = [text_batch(10 * step + 2 * number + rank) for number in range(micro)]
        targets = module.count_targets(batches)
        for number, batch in enumerate(batches):
            with module.accumulate(last=number == micro - 1, targets=targets):
                loss = module(**batch).loss
                loss.backward()
            found.append(loss.item())
        found.append(module.clip_grad_norm_(0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        found.append(module(**text_batch(99 + rank)).loss.item())
    return found


def whole(module: ParallelModule) -> dict[str, Tensor]:
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
        for name, value in module.state_dict().items()
    }


def both_ways(rank: int, world: int, plan: Plan, micro: int) -> tuple[list[float], list[float], bool, bool]:
    """Losses and norms of the plan as it is and with everything offloaded, whether both give the same weights, and
    whether what is on the device is only what is to be there."""
    host = replace(
        plan,
        offload_optimizer=True,
        blocks={name: replace(block, offload=True) for name, block in plan.blocks.items()},
    )
    losses, weights, placed = [], [], False
    for chosen in (plan, host):
        module = distributed(chosen)
        losses.append(train(module, optimizer_of(module), rank, micro))
        weights.append(whole(module))
        if chosen is host:
            store = module.store
            assert isinstance(store, HostStore)
            on_device, on_host = store.weights().values(), store.local.values()
            placed = {value.dtype for value in on_device} == {getattr(torch, plan.param_dtype)}
            placed = placed and all(value.dtype is torch.float32 for value in on_host)
            placed = placed and not {v.data_ptr() for v in on_device} & {v.data_ptr() for v in on_host}
    same = all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    return losses[0], losses[1], same, placed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "sharding", "dtype", "micro"),
    [
        (Mesh(dp_shard=2), Sharding.FSDP, "float32", 1),
        (Mesh(dp_shard=2, ep=2), Sharding.FSDP, "float32", 2),
        (Mesh(sp=2), Sharding.FSDP, "bfloat16", 2),
        (Mesh(dp_replicate=2), Sharding.REPLICATE, "bfloat16", 2),
    ],
    ids=["fsdp", "ep micro-steps", "sp bfloat16", "replicate bfloat16"],
)
def test_offloading_everything_changes_no_bit(mesh: Mesh, sharding: Sharding, dtype: str, micro: int) -> None:
    plan = replace(make_plan(("text",), mesh, sharding, recompute=Recompute.SELECTIVE), param_dtype=dtype)
    for plain, offloaded, same, placed in run_ranks(both_ways, 2, plan, micro):
        assert plain == offloaded
        assert same and placed


def resumed(rank: int, world: int, folder: str) -> tuple[list[float], list[float], bool]:
    """Training on after a checkpoint: with the optimizer on the host all the time, and from the host to the device and
    the other way."""
    plan = make_plan(("text",), Mesh(dp_shard=2))
    plans = {"device": plan, "host": replace(plan, offload_optimizer=True)}
    losses = []
    for first, second in (("host", "host"), ("host", "device"), ("device", "host")):
        module = distributed(plans[first])
        optimizer = optimizer_of(module)
        train(module, optimizer, rank)
        checkpointer = Checkpointer(Path(folder) / f"{first} {second}")
        checkpointer.save(1, module, optimizer, {})
        checkpointer.wait()
        module = distributed(plans[second])
        optimizer = optimizer_of(module)
        checkpointer.load(module, optimizer)
        losses.append(train(module, optimizer, rank))
    return losses[0], losses[1], losses[0] == losses[2]


def test_one_process_runs_an_offloading_plan_and_its_data_may_be_written() -> None:
    (found,) = run_ranks(alone, 1)
    assert found["kind"] == "ParallelModule"
    assert found["losses"] == pytest.approx(found["want"], abs=1e-5)
    assert found["after data"] != pytest.approx(found["losses"][0], abs=1e-4)


def alone(rank: int, world: int) -> dict[str, Any]:
    plan = replace(make_plan(("text",), Mesh(), Sharding.REPLICATE), offload_optimizer=True)
    module, plain = distributed(plan), mixture_model()
    found: dict[str, Any] = {"kind": type(module).__name__, "losses": [], "want": []}
    batch = text_batch(0)
    for model, losses in ((module, found["losses"]), (plain, found["want"])):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    module(**batch).loss.backward()
    for parameter in module.parameters():  # as optimizers of old do it: no version tells
        parameter.data.mul_(0.5)
    with torch.no_grad():
        found["after data"] = module(**batch).loss.item()
    return found


def refusals(rank: int, world: int) -> list[str]:
    plan = make_plan(("text",), Mesh(dp_shard=2), offload=True)
    said = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        distributed(plan, backend="eager")
    said += [str(item.message) for item in caught if "offloads activations" in str(item.message)]
    try:
        distributed(replace(plan, offload_optimizer=True, param_dtype="bfloat16"), backend="eager")
    except PlanError as error:
        said.append(str(error))
    return said


@pytest.mark.slow
def test_a_backend_without_step_graph_says_what_it_does_not_do() -> None:
    for warned, refused in run_ranks(refusals, 2):
        assert "activations of text" in warned and 'use backend="inductor" or "step"' in warned
        assert "master weights on the host" in refused and "backend" in refused


@pytest.mark.slow
def test_a_checkpoint_goes_on_whether_the_optimizer_is_on_the_host_or_not(tmp_path: Path) -> None:
    for host, to_device, same in run_ranks(resumed, 2, str(tmp_path)):
        assert host == to_device and same
