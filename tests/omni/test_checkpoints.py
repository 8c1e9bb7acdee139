"""Omni models through training runs: saved under one layout, continued under others, exported, loaded, the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from omni_models import MODELS, batch, processor, tiny
from tiny_models import make_plan, run_ranks
from torch import Tensor

import omnicompile
from omnicompile import omni
from omnicompile.checkpoint import Checkpointer, export_huggingface
from omnicompile.omni import OmniModel, OmniProcessor, Text
from omnicompile.plan import Layout, Mesh, Plan
from omnicompile.runtime.budget import Budget

BATCHES, STEPS, SAVED = 2, 4, 2  # micro-batches of a step over all ranks; the checkpoint is of the middle
BEFORE = {"janus_tiny": Mesh(dp_shard=2), "llama_omni_tiny": Mesh(sp=2), "qwen3_moe_omni_tiny": Mesh(dp_shard=2, ep=2)}
AFTER = {"janus_tiny": Mesh(sp=2), "llama_omni_tiny": Mesh(dp_replicate=2), "qwen3_moe_omni_tiny": Mesh(sp=2)}


def plan_of(model: OmniModel, mesh: Mesh) -> Plan:
    """Encoders and tokenizers with layouts of their own, where a sequence is cut at all."""
    blocks = ("text", "vision", "output_image", *(["audio"] if "audio" in model.config.encoders else []))
    plan = make_plan(blocks, mesh)
    layouts = {"vision": Layout.SEQUENCE, "audio": Layout.REPLICATED, "output_image": Layout.IMAGES}
    own = {
        name: block
        if name == "text"
        else dataclasses.replace(block, ep=1, layout=layouts[name] if mesh.sp > 1 else Layout.BATCH)
        for name, block in plan.blocks.items()
    }
    return dataclasses.replace(plan, blocks=own)


def train(module: Any, optimizer: Any, model: OmniModel, first: int, last: int, rank: int, mesh: Mesh) -> list[float]:
    """Losses of the steps from `first` to before `last`: of all micro-batches of all ranks."""
    group, share = rank // mesh.sp, BATCHES // mesh.data_ranks
    losses = []
    for step in range(first, last):
        micro = [batch(model, BATCHES * step + share * group + i, produced=i + group != 1) for i in range(share)]
        targets = module.count_targets(micro)
        total = 0.0
        for number, given in enumerate(micro):
            with module.accumulate(last=number == share - 1, targets=targets):
                loss = module(**given).loss
                loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def started(name: str, mesh: Mesh) -> tuple[OmniModel, Any, torch.optim.Optimizer]:
    model = tiny(name)
    example = Budget(128, None, restarts=True).fill(batch(model, 99)).batch
    module = omnicompile.parallelize(model, plan_of(model, mesh), "cpu", example_batch=example)
    return model, module, torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3)


def resumed(name: str, mesh: Mesh, folder: Path, rank: int) -> tuple[Any, list[float]]:
    """Continued from the checkpoint with other values in memory, which must not count."""
    model, module, optimizer = started(name, mesh)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)
    first = Checkpointer(folder).load(module, optimizer).step
    return module, train(module, optimizer, model, first, STEPS, rank, mesh)


def outputs(model: OmniModel) -> dict[str, Tensor]:
    """What a plain model computes and generates."""
    given = batch(model, 50)
    with torch.no_grad():
        output = model.eval()(**given)
    ids = processor(model)([[Text("<bos> draw a red")]])["input_ids"]
    start = torch.tensor([[model.config.decoder("image").start_token_id]])
    made = model.generate(torch.cat([ids, start], 1), max_new_tokens=model.decoder("image").item_tokens + 4)
    losses = {f"loss of {name}": value for name, value in output.losses.items()}
    return losses | {"logits": output.logits, "ids": made.ids, "picture": made.items["image"][0][0]}


def two_ranks(rank: int, world: int, name: str, root: str) -> dict[str, Any]:
    folder = Path(root)
    mesh = BEFORE[name]
    model, module, optimizer = started(name, mesh)
    losses = train(module, optimizer, model, 0, SAVED, rank, mesh)
    checkpointer = Checkpointer(folder / "run")
    checkpointer.save(SAVED, module, optimizer, {})
    losses += train(module, optimizer, model, SAVED, STEPS, rank, mesh)
    checkpointer.wait()
    other, again = resumed(name, AFTER[name], folder / "run", rank)
    plain = omni.gather_into(tiny(name), other)
    export_huggingface(other, folder / "exported", processor(model), max_file_bytes=100_000)
    return {"losses": losses, "resumed": again, "outputs": outputs(plain)}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_saved_resumed_under_another_layout_and_exported(name: str, tmp_path: Path) -> None:
    results = run_ranks(two_ranks, 2, name, str(tmp_path))
    model, module, optimizer = started(name, Mesh())
    alone = train(module, optimizer, model, 0, STEPS, 0, Mesh())
    for got in results:
        assert got["losses"] == pytest.approx(alone, rel=2e-5)
        assert got["resumed"] == pytest.approx(alone[SAVED:], rel=2e-5)
    assert alone[-1] < alone[0]
    _, one_process = resumed(name, Mesh(), tmp_path / "run", 0)
    assert one_process == pytest.approx(alone[SAVED:], rel=2e-5)

    loaded = OmniModel.from_pretrained(tmp_path / "exported")
    assert list((tmp_path / "exported").glob("model-*-of-*.safetensors")), "in several files"
    found = outputs(loaded)
    for key, value in results[0]["outputs"].items():
        assert torch.equal(found[key], value), key
    frozen = {n for n, p in tiny(name).named_parameters() if not p.requires_grad}
    assert {n for n, p in loaded.named_parameters() if not p.requires_grad} == frozen
    process = OmniProcessor.from_pretrained(tmp_path / "exported")
    sample = [[Text("a red sound")]]
    assert torch.equal(process(sample)["input_ids"], processor(model)(sample)["input_ids"])
