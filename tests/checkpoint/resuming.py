"""A few training steps in gloo processes, saved in the middle under one plan and continued under another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tiny_models import make_plan, mixture_model, text_batch
from torch import Tensor, nn

from omnicompile.checkpoint.checkpointer import Checkpointer
from omnicompile.plan import Mesh, Sharding
from omnicompile.runtime.parallelize import parallelize

BATCHES = 4  # micro-batches of a step, over all ranks
STEPS, SAVED = 6, 3


def uneven_model(dropout: float = 0.0) -> nn.Module:
    """No dimension is divisible by 4 ranks but the hidden size; the norms of queries have 6 elements."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=127, hidden_size=32, intermediate_size=65, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=6, max_position_embeddings=64, use_cache=False, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).float().train()
    return WithDropout(model, dropout) if dropout else model


class WithDropout(nn.Module):
    """Drops elements of the embeddings."""

    def __init__(self, model: nn.Module, rate: float) -> None:
        super().__init__()
        self.model, self.drop = model, nn.Dropout(rate)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        embedded = self.drop(self.model.get_input_embeddings()(input_ids))
        return self.model(inputs_embeds=embedded, labels=labels)


def dropping_model() -> nn.Module:
    return uneven_model(dropout=0.2)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "uneven": uneven_model,
    "dropping": dropping_model,
    "experts": mixture_model,
}


@dataclass(frozen=True)
class Layout:
    mesh: Mesh
    sharding: Sharding = Sharding.FSDP


def momentum_or_adamw(module: nn.Module, name: str) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    return torch.optim.AdamW(module.parameters(), lr=1e-2, fused=name == "fused")


def run(rank: int, model: str, layout: Layout, optimizer: str, folder: str, load: bool, save: bool) -> list[float]:
    """Losses of the steps after the save (after `load`), or of all."""
    plan = make_plan(("text",), layout.mesh, layout.sharding)
    torch.manual_seed(0)
    module = parallelize(MODELS[model](), plan, "cpu", text_batch(0, 32))
    chosen = momentum_or_adamw(module, optimizer)
    checkpointer = Checkpointer(folder)
    torch.manual_seed(1234 + rank + 100 * load)  # rank 0's counts, and only a run that does not load keeps it
    first = 0
    if load:
        with torch.no_grad():  # what is loaded, not what was there, must count
            for parameter in module.parameters():
                parameter.mul_(1.5)
        first = checkpointer.load(module, chosen).step
    groups = layout.mesh.data_ranks
    mine, share = rank // layout.mesh.sp, BATCHES // groups
    losses = []
    for step in range(first, STEPS):
        if save and step == SAVED:
            checkpointer.save(step, module, chosen, {"step": step})
        micro = [text_batch(BATCHES * step + groups * i + mine, 32) for i in range(share)]
        targets = module.count_targets(micro)
        total = 0.0
        for number, batch in enumerate(micro):
            with module.accumulate(last=number == share - 1, targets=targets):
                loss = module(**batch).loss
                loss.backward()
            total += loss.item()
        chosen.step()
        chosen.zero_grad()
        losses.append(total)
    checkpointer.wait()
    return losses


def saved_and_resumed(
    rank: int, world: int, cases: list[tuple[str, str, Layout, Layout]], root: str
) -> dict[str, tuple[list[float], list[float]]]:
    """By case: losses of the uninterrupted run after the save, and of the resumed one."""
    found = {}
    for number, (model, optimizer, before, after) in enumerate(cases):
        folder = f"{root}/{number}"
        whole = run(rank, model, before, optimizer, folder, load=False, save=True)
        found[str(number)] = (whole[SAVED:], run(rank, model, after, optimizer, folder, load=True, save=False))
    return found


def only_run(
    rank: int, world: int, cases: list[tuple[str, str, Layout, Layout]], root: str, after: bool
) -> list[list[float]]:
    """The uninterrupted runs, or those that continue them with another number of processes."""
    return [
        run(rank, model, layouts[after], optimizer, f"{root}/{number}", load=after, save=not after)
        for number, (model, optimizer, *layouts) in enumerate(cases)
    ]
