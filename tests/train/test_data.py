"""What `--data` names, and the budget that its samples are packed to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runs
from torch import nn

from omnicompile.capture.source import load_model_source
from omnicompile.data.read import sample_sizes
from omnicompile.errors import InputError, RecipeError
from omnicompile.plan import Mesh
from omnicompile.train.data import BudgetOptions, Data, load_data_options, open_data
from omnicompile.train.run import Request, processor_of

MODEL = str(runs.EXAMPLE / "tiny_vl.py")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return load_model_source(MODEL).build_meta().train()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("data")
    runs.make_data(found, 40)
    return found


def opened(folder: Path, model: nn.Module, mesh: Mesh, data: str = "train.jsonl", **budget: Any) -> Data:
    processor = processor_of(Request(Path("recipe.yaml"), ""), MODEL)
    plan = runs.plan(mesh)
    return open_data(str(folder / data), processor, model, replace(plan, workload=replace(plan.workload, **budget)))


def test_a_data_file_names_sources_beside_it(folder: Path) -> None:
    options = load_data_options(str(folder / "data.yaml"))
    assert options.source == (str(folder / "train.jsonl"),) and options.look_ahead == 32
    assert options.budget == BudgetOptions(runs.TOKENS, runs.PATCHES, 0, 32)
    assert load_data_options("x/*.jsonl").source == ("x/*.jsonl",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sources: [a.jsonl]\n", "did you mean source?"),
        ("source: a.jsonl\nbudget: {token: 3}\n", "data.yaml:2: budget.token: unknown key"),
        ("look_ahead: 3\n", "'source' is missing"),
        ("source: [3]\n", "must be text"),
    ],
)
def test_a_mistake_in_a_data_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(RecipeError, match=said.replace("?", r"\?")):
        load_data_options(str(tmp_path / "data.yaml"))


def test_a_budget_is_found_for_the_mix_and_does_not_depend_on_the_recipe(folder: Path, model: nn.Module) -> None:
    found = [opened(folder, model, mesh, seq_len=256).budget for mesh in (Mesh(), Mesh(dp_shard=2, sp=2), Mesh(sp=8))]
    assert found[0] == found[1] == found[2]
    data = opened(folder, model, Mesh(), seq_len=256)
    sizes = sample_sizes(data.source, data.encoder, 100)
    assert len(sizes) == 40 and found[0].tokens == 256 and found[0].patches % 32 == 0
    assert all(found[0].holds(size) for size in sizes)


def test_loaders_of_all_recipes_pack_the_same_steps(folder: Path, model: nn.Module) -> None:
    whole = opened(folder, model, Mesh(), "data.yaml")
    plan = runs.plan(Mesh(), 2)
    want = [step.keys for step in whole.loader(model, plan, 0, 3, 1)]
    cut = opened(folder, model, Mesh(dp_shard=2, sp=2), "data.yaml")
    for rank in (0, 1):
        steps = list(cut.loader(model, runs.plan(Mesh(dp_shard=2, sp=2)), rank, 3, 1))
        assert [step.keys for step in steps] == want
        assert all(len(step.micro_batches) == 1 for step in steps)
    keys = [key for step in want for key in step]
    assert sorted(keys) == [(0, number, 0) for number in range(40)]
    assert whole.name_of((0, 0, 0)) == f"{folder}/train.jsonl at byte 0"
    assert whole.name_of((0, 0, 1)).endswith("part 1")


def test_what_does_not_fit_together_is_refused(folder: Path, model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not divide over sp=7"):
        opened(folder, model, Mesh(sp=7), seq_len=256)
    with pytest.raises(InputError, match="do not fit into 32 tokens"):
        opened(folder, model, Mesh(), seq_len=32)
    (tmp_path / "bad.jsonl").write_text(json.dumps({"messages": []}) + "\n")
    with pytest.raises(InputError, match=r"bad.jsonl at byte 0: .*; mend or remove it"):
        opened(tmp_path, model, Mesh(), "bad.jsonl")


def test_a_processor_comes_from_the_models_file_or_a_folder(tmp_path: Path) -> None:
    bare = tmp_path / "bare.py"
    bare.write_text("def build():\n    import torch\n    return torch.nn.Linear(2, 2)\n")
    with pytest.raises(InputError, match=r"define processor\(\) in .*bare.py"):
        processor_of(Request(Path("r"), ""), str(bare))()
    with pytest.raises(InputError, match="holds no processor"):
        processor_of(Request(Path("r"), "", processor=str(tmp_path)), str(bare))()
    assert type(processor_of(Request(Path("r"), ""), MODEL)()).__name__ == "ImageTextProcessor"
