"""The tutorial in docs/omni.md: a modality more, by declaration alone."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
import yaml
from omni_models import EXAMPLES, tokenizer
from tiny_models import make_plan
from torch import Tensor

from omnicompile import omni
from omnicompile.lowering.proof import prove
from omnicompile.lowering.tiny import TinyModel
from omnicompile.omni import Item, OmniModel, OmniProcessor, Text
from omnicompile.plan import Layout, Mesh
from omnicompile.runtime.budget import Budget

DOCUMENT = Path(__file__).parents[2] / "docs" / "omni.md"


def declaration() -> str:
    found = re.search(r"<!-- depth -->\n```yaml\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert found is not None
    return found.group(1)


@pytest.fixture
def model(tmp_path: Path) -> OmniModel:
    fields = yaml.safe_load(declaration())
    file = tmp_path / "depth.yaml"
    file.write_text(yaml.safe_dump(fields | {"extends": str(EXAMPLES / fields["extends"])}))
    torch.manual_seed(0)
    return omni.build(file)


def depth_batch(model: OmniModel, seed: int, maps: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    process = OmniProcessor(model, tokenizer(model.config.special_tokens))
    samples = [[Text("a red sound of this"[: 9 + seed])]]
    for _ in range(maps):
        item = Item("depth", torch.randn(model.encoder("depth").item_shape, generator=generator))
        samples.append([Text("what is this", trained=False), item, Text("a red")])
    return process(samples)


def test_it_takes_at_most_fifteen_lines() -> None:
    assert len(declaration().strip().splitlines()) <= 15


def test_it_is_read_trained_saved_and_loaded(model: OmniModel, tmp_path: Path) -> None:
    given = depth_batch(model, 0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    first = model(**given).loss.item()
    for _ in range(5):
        model(**given).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = model(**given).loss
    assert trained.item() < first
    before = model(**{**given, "depth_values": given["depth_values"] + 1}).loss
    assert before.item() != trained.item()
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(OmniModel.from_pretrained(tmp_path / "saved").train()(**given).loss, trained)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout.SEQUENCE, Layout.IMAGES])
def test_two_ranks_one_without_a_depth_map_are_as_one(model: OmniModel, layout: Layout) -> None:
    model = model.double()
    example = Budget(64, None, restarts=True).fill(depth_batch(model, 9, maps=2)).batch
    budget = Budget.of(model, example)
    plan = make_plan(("text", "depth"), Mesh(dp_shard=2, sp=2))
    blocks = plan.blocks | {"depth": dataclasses.replace(plan.blocks["depth"], layout=layout)}

    def batch(rank: int) -> dict[str, Tensor]:
        found = budget.fill(depth_batch(model, rank, maps=2 * (1 - rank))).batch
        return found | {"depth_values": found["depth_values"].double()}

    report = prove(TinyModel(model, batch), dataclasses.replace(plan, blocks=blocks))
    assert report.equal, (report.loss_error, report.worst, report.verdict)
