"""What two gloo processes do with Hugging Face checkpoints: load parts, train a step, export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_models import (
    image_batch,
    make_plan,
    mixture_model,
    reference_gradients,
    text_batch,
    vision_language_model,
    worst_error,
)
from torch import Tensor, nn

from omnicompile.checkpoint.checkpointer import Checkpointer
from omnicompile.checkpoint.export import export_huggingface
from omnicompile.plan import Mesh
from omnicompile.runtime.parallelize import parallelize

GRIDS = [[(1, 4, 8), (1, 8, 8)], [(1, 6, 16)]]
LEARNING_RATE = 1e-2


def images(seed: int) -> dict[str, Tensor]:
    return image_batch(seed, GRIDS[seed % 2])  # type: ignore[arg-type]


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], dict[str, Tensor]], tuple[str, ...], Mesh]] = {
    "images": (vision_language_model, images, ("text", "vision"), Mesh(dp_shard=2)),
    "experts": (mixture_model, text_batch, ("text",), Mesh(dp_shard=2, ep=2)),
    "experts sharded": (mixture_model, text_batch, ("text",), Mesh(dp_shard=2)),
}


def on_meta(model: Any) -> Any:
    """The same model without values."""
    with torch.device("meta"):
        return type(model)(model.config).train()


def with_adapters(model: nn.Module, random: bool = False) -> Any:
    import peft

    torch.manual_seed(7)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], init_lora_weights=not random
    )
    return peft.get_peft_model(model, config)


def loaded_trained_exported(rank: int, name: str, root: str) -> dict[str, Any]:
    make, batch, blocks, mesh = CASES[name]
    model = make()
    module = parallelize(
        on_meta(model), make_plan(blocks, mesh), "cpu", batch(0), weights=Path(root) / name / "pretrained"
    )
    wrong = [
        key
        for key, value in model.named_parameters()
        if not torch.equal(module.store.full(key, module.store.local[key]), value)
    ]
    optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE)
    loss = module(**batch(rank)).loss
    loss.backward()
    optimizer.step()
    export_huggingface(module, Path(root) / name / "exported", max_file_bytes=60_000)
    return {"wrong": wrong, "loss": loss.item()}


def adapters(rank: int, root: str) -> dict[str, Any]:
    """Gradients of adapters beside one process; the model's initialization and weights; a step, saved and exported."""
    make, batch, blocks, mesh = CASES["experts"]
    plan, found = make_plan(blocks, mesh), {}
    reference = with_adapters(make(), random=True)
    module = parallelize(with_adapters(make(), random=True), plan, "cpu", batch(0))
    module(**batch(rank)).loss.backward()
    _, gradients = reference_gradients(reference, [batch(0), batch(1)])
    got = {name: module.full_gradient(name) for name in gradients}
    found["gradient"] = worst_error(got, gradients)
    found["trained"] = sorted(name for name, p in module.named_parameters() if p.grad is not None)
    found["adapters"] = sorted(name for name, p in reference.named_parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=LEARNING_RATE)
    optimizer.step()
    export_huggingface(module, Path(root) / "adapters")
    checkpointer = Checkpointer(Path(root) / "run", frozen=False)
    checkpointer.save(1, module, optimizer, {})

    meta = parallelize(with_adapters(on_meta(make())), plan, "cpu", batch(0), weights=Path(root) / "experts/pretrained")
    state = {name: meta.store.full(name, value) for name, value in meta.store.local.items()}
    base = with_adapters(make()).state_dict()
    found["base"] = [n for n, v in state.items() if ".lora_" not in n and not torch.equal(v, base[n])]
    found["B"] = max(float(v.abs().max()) for n, v in state.items() if ".lora_B." in n)
    found["A"] = [float(v.std()) for n, v in state.items() if ".lora_A." in n]
    checkpointer.wait()
    own = torch.optim.AdamW([p for p in meta.parameters() if p.requires_grad], lr=1.0)
    checkpointer.load(meta, own)
    found["resumed"] = max(
        float((meta.store.local[name] - value).detach().abs().max()) for name, value in module.store.local.items()
    )
    return found


def initialized(rank: int, root: str) -> dict[str, Any]:
    """Of a model on the meta device, without weights: whole values, and a loss."""
    make, batch, blocks, mesh = CASES["images"]
    module = parallelize(on_meta(make()), make_plan(blocks, mesh), "cpu", batch(0), seed=3)
    values = {name: module.store.full(name, value) for name, value in module.store.local.items()}
    return {"values": values, "loss": module(**batch(rank)).loss.item()}


def everything(rank: int, world: int, root: str) -> dict[str, Any]:
    found: dict[str, Any] = {name: loaded_trained_exported(rank, name, root) for name in CASES}
    return found | {"adapters": adapters(rank, root), "initialized": initialized(rank, root)}
