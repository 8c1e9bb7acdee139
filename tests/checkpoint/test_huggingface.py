"""Two processes load a Hugging Face checkpoint in parts, train and export it; what they export is as one process's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import mixture_model, reference_gradients, run_ranks, vision_language_model
from torch import nn

from checkpoint.huggingface_ranks import CASES, LEARNING_RATE, everything, on_meta, with_adapters
from omnicompile.runtime.parallelize import parallelize

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("huggingface")
    for name, (make, *_) in CASES.items():
        make().save_pretrained(folder / name / "pretrained", max_shard_size="60KB")
    return folder


@pytest.fixture(scope="module")
def results(root: Path) -> list[dict[str, Any]]:
    return run_ranks(everything, 2, str(root))


def trained_by_one_process(name: str) -> tuple[nn.Module, float]:
    make, batch, _, _ = CASES[name]
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    loss, gradients = reference_gradients(model, [batch(0), batch(1)])
    for key, parameter in model.named_parameters():
        parameter.grad = gradients.get(key)
    optimizer.step()
    return model.eval(), loss


@pytest.mark.parametrize("name", CASES)
def test_loaded_trained_exported(results: list[dict[str, Any]], root: Path, name: str) -> None:
    model, loss = trained_by_one_process(name)
    for found in results:
        assert found[name]["wrong"] == []
        assert found[name]["loss"] == pytest.approx(loss, abs=1e-5)
    exported = type(model).from_pretrained(root / name / "exported").eval()
    batch = CASES[name][1](3)
    with torch.no_grad():
        worst = (exported(**batch).logits - model(**batch).logits).abs().max().item()
    print(f"{name}: logits differ by {worst:.1e}")
    assert worst < 1e-5
    assert len(list((root / name / "exported").glob("model-*.safetensors"))) > 1


def test_adapters(results: list[dict[str, Any]], root: Path) -> None:
    for found in results:
        got = found["adapters"]
        assert got["gradient"] < 1e-5
        assert got["trained"] == got["adapters"]
        assert got["base"] == [] and got["B"] == 0.0 and min(got["A"]) > 0.05
        assert got["resumed"] == 0.0
    import peft

    batch = CASES["experts"][1]
    reference = with_adapters(mixture_model(), random=True)
    _, gradients = reference_gradients(reference, [batch(0), batch(1)])
    trained = [p for p in reference.parameters() if p.requires_grad]
    for key, parameter in reference.named_parameters():
        parameter.grad = gradients.get(key)
    torch.optim.AdamW(trained, lr=LEARNING_RATE).step()
    loaded = peft.PeftModel.from_pretrained(mixture_model(), root / "adapters").eval()
    with torch.no_grad():
        worst = (loaded(**batch(3)).logits - reference.eval()(**batch(3)).logits).abs().max().item()
    print(f"adapters: logits differ by {worst:.1e}")
    assert worst < 1e-5


def test_initial_values_do_not_depend_on_the_number_of_processes(results: list[dict[str, Any]]) -> None:
    alone = dict(parallelize(on_meta(vision_language_model()), None, "cpu", seed=3).named_parameters())
    for found in results:
        values = found["initialized"]["values"]
        assert all(torch.equal(values[name], value) for name, value in alone.items())
        assert found["initialized"]["loss"] == pytest.approx(4.85, abs=0.3)  # log(128): nothing is learnt yet
