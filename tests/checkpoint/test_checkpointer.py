"""One process: what is saved comes back, and nothing but whole checkpoints is ever read."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omnicompile.checkpoint.checkpointer import Checkpointer
from omnicompile.errors import CheckpointError, InputError
from omnicompile.runtime.plain_module import PlainModule


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where that is possible: every save waits until the disk has it."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder)


def small(width: int = 6, batch_norm: bool = True) -> PlainModule:
    torch.manual_seed(1)
    layers: list[nn.Module] = [nn.Linear(4, width), nn.Dropout(0.3), nn.Linear(width, 2)]
    return PlainModule(nn.Sequential(*layers, *([nn.BatchNorm1d(2)] if batch_norm else [])))


def adamw(module: PlainModule, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-2, **options)


def train(module: PlainModule, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """Losses; dropout draws from the default generator, data from the step's own."""
    losses = []
    for step in steps:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        loss = module._model[0](x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def muon(module: PlainModule) -> torch.optim.Optimizer:
    return torch.optim.Muon([p for p in module.parameters() if p.dim() == 2], lr=1e-2)


@pytest.mark.parametrize("make", [adamw, lambda m: adamw(m, fused=True), lambda m: adamw(m, amsgrad=True), muon,
                                  lambda m: torch.optim.SGD(m.parameters(), lr=0.1)])  # fmt: skip
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(tmp_path: Path, make: Any, asynchronous: bool) -> None:
    module = small()
    optimizer = make(module)
    torch.manual_seed(5)
    train(module, optimizer, range(3))
    checkpointer = Checkpointer(tmp_path / "run", asynchronous=asynchronous)
    checkpointer.save(3, module, optimizer, {"loader": {"epoch": 1, "seen": [1, 2]}})
    want = train(module, optimizer, range(3, 6))  # while the save is being written
    checkpointer.wait()

    torch.manual_seed(99)
    other = small()
    fresh = make(other)
    for group in fresh.param_groups:
        group["lr"] = 7.0
    restored = Checkpointer(tmp_path / "run").load(other, fresh)
    assert restored.step == 3
    assert restored.extra == {"loader": {"epoch": 1, "seen": [1, 2]}}
    assert train(other, fresh, range(3, 6)) == want
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), other.state_dict().values()))


def saved(folder: Path, steps: tuple[int, ...], keep_last: int = 3) -> tuple[PlainModule, torch.optim.Optimizer]:
    module = small()
    optimizer = adamw(module)
    checkpointer = Checkpointer(folder, keep_last=keep_last)
    for step in steps:
        train(module, optimizer, range(step, step + 1))
        checkpointer.save(step, module, optimizer, {"at": step})
    checkpointer.wait()
    return module, optimizer


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, (10, 20, 30, 40), keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000030", "step-00000040"]
    assert Checkpointer(tmp_path).latest() == 40


def test_the_last_written_counts_when_a_run_goes_back(tmp_path: Path) -> None:
    module, optimizer = saved(tmp_path, (10, 20))
    checkpointer = Checkpointer(tmp_path)
    checkpointer.load(module, optimizer, step=10)
    checkpointer.save(10, module, optimizer, {"at": "again"})
    assert Checkpointer(tmp_path).latest() is not None
    checkpointer.wait()
    assert Checkpointer(tmp_path).latest() == 10
    assert Checkpointer(tmp_path).load(module, optimizer).extra == {"at": "again"}
    assert Checkpointer(tmp_path).load(module, optimizer, step=20).extra == {"at": 20}


def files_of(path: Path) -> list[str]:
    return sorted(json.loads((path / "manifest.json").read_text())["files"])


@pytest.mark.parametrize("fault", ["shorter", "missing", "longer"])
@pytest.mark.parametrize("which", ["tensors", "metadata", "manifest"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_is_loaded(
    tmp_path: Path, fault: str, which: str
) -> None:
    module, optimizer = saved(tmp_path, (1, 2))
    newest = tmp_path / "step-00000002"
    names = {"tensors": "__0_0.distcp", "metadata": ".metadata", "manifest": "manifest.json"}
    assert files_of(newest) == [".metadata", "__0_0.distcp"]
    file = newest / names[which]
    content = file.read_bytes()
    if fault == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-7] if fault == "shorter" else content + b"more")
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.latest() == 1
    with pytest.raises(CheckpointError, match=rf"{names[which]}.*load step 1, the last whole one"):
        checkpointer.load(module, optimizer, step=2)
    with pytest.warns(UserWarning, match=f"{names[which]}.*step 1 is loaded instead"):
        assert checkpointer.load(module, optimizer).extra == {"at": 1}


def test_without_a_checkpoint(tmp_path: Path) -> None:
    module = small()
    checkpointer = Checkpointer(tmp_path / "none")
    assert checkpointer.latest() is None
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        checkpointer.load(module, adamw(module))
    saved(tmp_path / "some", (4,))
    with pytest.raises(CheckpointError, match="has no checkpoint of step 5: load step 4"):
        Checkpointer(tmp_path / "some").load(module, adamw(module), step=5)


def unchanged(module: PlainModule, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(before[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (small(width=5), r"0.weight is \[6, 4\] there and \[5, 4\] in the model"),
        (small(batch_norm=False), "the model has no 3.weight"),
        (PlainModule(nn.Sequential(*small()._model[0], nn.Linear(2, 2))), r"it has no 4.weight; it has no 4.bias"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, module: PlainModule, message: str) -> None:
    saved(tmp_path, (1,))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"of another model: .*{message}"):
        Checkpointer(tmp_path).load(module, adamw(module))
    assert unchanged(module, before)


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, (1,))
    module = small()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(CheckpointError, match="of a AdamW optimizer, this is SGD"):
        Checkpointer(tmp_path).load(module, torch.optim.SGD(module.parameters(), lr=1.0))
    frozen = torch.optim.AdamW([p for n, p in module.named_parameters() if n != "0.bias"])
    with pytest.raises(CheckpointError, match=r"only the checkpoint trains 0\.bias"):
        Checkpointer(tmp_path).load(module, frozen)
    with pytest.raises(CheckpointError, match="not the module's"):
        Checkpointer(tmp_path).save(2, module, torch.optim.SGD([nn.Parameter(torch.ones(1))]), {})
    assert unchanged(module, before)
    assert not list(tmp_path.glob(".saving-*"))


def test_bad_arguments(tmp_path: Path) -> None:
    module = small()
    with pytest.raises(InputError, match="keep_last"):
        Checkpointer(tmp_path, keep_last=0)
    with pytest.raises(InputError, match="what JSON can hold"):
        Checkpointer(tmp_path).save(1, module, adamw(module), {"loader": torch.ones(2)})
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write checkpoints"):
        Checkpointer(tmp_path / "file").save(1, module, adamw(module), {})


def test_frozen_parameters_may_be_left_out(tmp_path: Path) -> None:
    def frozen(seed: int) -> tuple[PlainModule, torch.optim.Optimizer]:
        module = small(width=200)
        with torch.no_grad():
            module.get_parameter("0.weight").mul_(seed)
        module.get_parameter("0.weight").requires_grad_(False)
        return module, torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)

    module, optimizer = frozen(1)
    train(module, optimizer, range(2))
    for name, whole in (("whole", True), ("part", False)):
        checkpointer = Checkpointer(tmp_path / name, frozen=whole)
        checkpointer.save(2, module, optimizer, {})
        checkpointer.wait()
    sizes = [(tmp_path / name / "step-00000002" / "__0_0.distcp").stat().st_size for name in ("whole", "part")]
    assert sizes[0] - sizes[1] >= 4 * 200 * 4
    other, own = frozen(1)
    Checkpointer(tmp_path / "part").load(other, own)
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), other.state_dict().values()))
    other, own = frozen(2)
    Checkpointer(tmp_path / "whole").load(other, own)
    other, own = frozen(2)
    with pytest.raises(CheckpointError, match=r"0\.weight is not the one of that run \(1 differ\)"):
        Checkpointer(tmp_path / "part").load(other, own)
