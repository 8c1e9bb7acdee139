"""Programs on a GPU train as the plain model does on it: one process in a group of its own (NCCL).

In float32 with TensorFloat32 off, so that what differs is the order of sums; in bfloat16 within its rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from passes.models import (
    dense_model,
    image_batch,
    latent_mixture_model,
    mixture_model,
    stacked_mixture_vl_model,
    text_batch,
    vision_language_model,
    windowed_model,
)
from tiny_models import reference_gradients, worst_error
from torch import Tensor, nn

from omnicompile.cluster import Cluster
from omnicompile.plan import BlockPlan, LossHead, Mesh, Plan
from omnicompile.recompute import Recompute
from omnicompile.runtime.parallel_module import ParallelModule
from omnicompile.runtime.parallelize import parallelize
from omnicompile.runtime.plain_module import PlainModule
from omnicompile.workload import Workload

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

Batch = dict[str, Tensor]
GPU = torch.device("cuda", 0)
TOLERANCE = 2e-5
GRIDS = [(1, 4, 8), (1, 8, 8)]


def images(seed: int) -> Batch:
    return image_batch(seed, GRIDS if seed % 2 == 0 else GRIDS[::-1])


def wide_model() -> nn.Module:
    """Heads that flex attention takes, which is there for float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).float().train()


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Batch], tuple[str, ...]]] = {
    "dense": (dense_model, text_batch, ("text",)),
    "wide": (wide_model, text_batch, ("text",)),
    "tied": (lambda: dense_model(tied=True), text_batch, ("text",)),
    "mixture": (mixture_model, text_batch, ("text",)),
    "auxiliary": (lambda: mixture_model(aux=True), text_batch, ("text",)),
    "latent mixture": (latent_mixture_model, text_batch, ("text",)),
    "vision": (vision_language_model, images, ("text", "vision")),
    "windowed": (windowed_model, images, ("text", "vision")),
    "stacked mixture": (stacked_mixture_vl_model, images, ("text", "vision")),
}


def plan_of(kind: str, dtype: str = "float32") -> Plan:
    """For one process. It recomputes: otherwise the plain model would do."""
    blocks = dict.fromkeys(MODELS[kind][2], BlockPlan(recompute=Recompute.SELECTIVE))
    return Plan("tiny", Cluster(gpus=1), Workload(seq_len=64), Mesh(), blocks, param_dtype=dtype)


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No launcher, no group that an earlier test has left, and convolutions in float32 too."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def step(kind: str, plan: Plan, backend: str) -> tuple[float, float, set[str]]:
    """Errors of the loss and of the worst gradient beside the plain model's, and where the parameters are."""
    make_model, make_batch, _ = MODELS[kind]
    module = parallelize(make_model(), plan, "cuda", make_batch(0), backend=backend)
    assert isinstance(module, ParallelModule)
    batch = {name: value.to(GPU) for name, value in make_batch(3).items()}
    module(**batch).loss.backward()  # what is left of a first step must not change the second
    for parameter in module.parameters():
        parameter.grad = None
    loss = module(**batch).loss
    loss.backward()
    want, gradients = reference_gradients(make_model().to(GPU), [batch])
    got = {name: module.full_gradient(name).to(GPU) for name in gradients}
    where = {value.device.type for value in module.stored().values()}
    return abs(loss.item() - want) / abs(want), worst_error(got, gradients), where


@pytest.mark.parametrize("backend", ["step", "inductor", "eager"])
@pytest.mark.parametrize("kind", MODELS)
def test_float32_equals_the_plain_model(kind: str, backend: str) -> None:
    plan = plan_of(kind)
    loss, gradient, where = step(kind, plan, backend)
    assert loss < TOLERANCE and gradient < TOLERANCE and where == {"cuda"}


@pytest.mark.parametrize("kind", ["dense", "mixture", "vision"])
def test_bfloat16_within_its_rounding(kind: str) -> None:
    plan = plan_of(kind, "bfloat16")
    loss, gradient, _ = step(kind, plan, "inductor")
    assert loss < 1e-2 and gradient < 0.3


def test_the_plain_model_takes_a_batch_of_host_memory() -> None:
    module = parallelize(dense_model(), None, "cuda")
    assert isinstance(module, PlainModule)
    assert module(**text_batch(3)).loss.item() == pytest.approx(dense_model()(**text_batch(3)).loss.item(), rel=1e-5)


@pytest.mark.parametrize("choice", ["chunked", "recompute", "offload", "torch.compile"])
def test_choices_of_a_plan(choice: str) -> None:
    plan, backend, where = plan_of("wide"), "inductor", {"cuda"}
    if choice == "chunked":
        plan = replace(plan, loss_head=LossHead.CHUNKED)
    elif choice == "recompute":
        plan = replace(plan, blocks={"text": BlockPlan(recompute=Recompute.FULL)})
    elif choice == "offload":
        block = replace(plan.blocks["text"], offload=True, recompute=Recompute.NONE)
        plan, where = replace(plan, blocks={"text": block}, offload_optimizer=True), {"cpu"}
    else:
        backend = "torch.compile"
    loss, gradient, found = step("wide", plan, backend)
    assert loss < TOLERANCE and gradient < TOLERANCE and found == where
