"""What is exported is what transformers would have saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from passes.models import dense_model, latent_mixture_model, stacked_mixture_vl_model
from safetensors.torch import load_file
from tiny_models import mixture_model, vision_language_model
from torch import Tensor, nn

from omnicompile.checkpoint.export import export_huggingface
from omnicompile.errors import CheckpointError, InputError
from omnicompile.runtime.plain_module import PlainModule


def tied_model() -> nn.Module:
    return dense_model(tied=True)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize(
    "make", [vision_language_model, mixture_model, tied_model, latent_mixture_model, stacked_mixture_vl_model]
)
def test_the_same_tensors_as_transformers_saves(tmp_path: Path, make: Callable[[], Any]) -> None:
    model = make()
    model.save_pretrained(tmp_path / "theirs")
    export_huggingface(PlainModule(model), tmp_path / "ours", max_file_bytes=40_000)
    theirs, ours = tensors_in(tmp_path / "theirs"), tensors_in(tmp_path / "ours")
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 1
    loaded = type(model).from_pretrained(tmp_path / "ours")
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))


def test_an_export_replaces_the_one_before(tmp_path: Path) -> None:
    model = tied_model()
    export_huggingface(PlainModule(model), tmp_path, max_file_bytes=40_000)
    export_huggingface(PlainModule(model), tmp_path, dtype=torch.bfloat16)
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert {value.dtype for value in tensors_in(tmp_path).values()} == {torch.bfloat16}
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.dtype is torch.bfloat16 and model.dtype is torch.float32
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.bfloat16())


class Processor:
    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "processor_config.json").write_text("{}")


def test_the_processor_goes_with_it(tmp_path: Path) -> None:
    export_huggingface(PlainModule(tied_model()), tmp_path, Processor())
    assert (tmp_path / "processor_config.json").exists() and (tmp_path / "config.json").exists()


def test_adapters_are_written_as_peft_does(tmp_path: Path) -> None:
    import peft

    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(dense_model(), config)
    model.save_pretrained(tmp_path / "theirs")
    export_huggingface(PlainModule(model), tmp_path / "ours")
    theirs, ours = tensors_in(tmp_path / "theirs"), tensors_in(tmp_path / "ours")
    assert set(ours) == set(theirs) and all(torch.equal(ours[key], value) for key, value in theirs.items())
    loaded = peft.PeftModel.from_pretrained(dense_model(), tmp_path / "ours").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())


def test_what_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="Linear is not a model of transformers"):
        export_huggingface(PlainModule(nn.Linear(2, 2)), tmp_path)
    model = tied_model()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to"):
        export_huggingface(PlainModule(model), tmp_path / "file")
    export_huggingface(PlainModule(model), tmp_path / "old")
    before = (tmp_path / "old" / "model.safetensors").read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("omnicompile.checkpoint.export.save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        export_huggingface(PlainModule(model), tmp_path / "old")
    assert (tmp_path / "old" / "model.safetensors").read_bytes() == before
