"""Values of a meta model from a Hugging Face checkpoint: each rank reads the parts that it stores, file by file."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from omnicompile.errors import InputError
from omnicompile.runtime.adapters import adapted, names_with_adapters
from omnicompile.runtime.conversion import Conversion, Renamed, by_file, conversions
from omnicompile.runtime.safetensors_folder import SafetensorsFolder
from omnicompile.runtime.weights import Initialized, Target

_SHOWN = 5


@dataclass(frozen=True)
class BaseModel:
    """The model that a checkpoint is of. model: of transformers, or any other one. names: in its state dict -> in the
    whole model, which may hold it with adapters put in. Adapters have no place in the checkpoint."""

    model: nn.Module
    names: Mapping[str, tuple[str, ...]]

    @staticmethod
    def of(model: nn.Module) -> BaseModel:
        inside = adapted(model)
        if inside is None:
            return BaseModel(model, {name: (name,) for name in model.state_dict()})
        prefix, base = inside
        with torch.device("meta"):
            plain = type(base)(base.config)
        return BaseModel(plain, names_with_adapters(model, prefix, plain))


class Pretrained:
    """Values of a meta model from a folder that save_pretrained has written.

    Every key of the checkpoint and every tensor of the model must be accounted for, but for what transformers itself
    ignores. What the checkpoint need not have, and buffers outside the state dict, come from the initialization.
    """

    def __init__(self, folder: SafetensorsFolder, initialized: Initialized, sources: dict[str, tuple[Conversion, str]]):
        self.folder = folder
        self._initialized = initialized
        self._sources = sources

    @staticmethod
    def of(model: nn.Module, path: str | Path, seed: int) -> Pretrained:
        """Raises InputError naming keys that are missing or unexpected, or shapes that differ."""
        folder = SafetensorsFolder(path)
        base = BaseModel.of(model)
        own = base.model.state_dict()
        found, unexpected = _conversions(base.model, own, folder)
        given = {name: one for one in found for name in one.names()}
        unexpected |= {name for name in given if name not in own}
        groups = _tied(base.model, own)
        missing = {name for name in own if not any(other in given for other in groups[name])}
        missing, unexpected = _adjusted(base.model, missing, unexpected)
        _require_all(folder, base.model, missing, unexpected)
        firsts = _first_names(model)
        sources: dict[str, tuple[Conversion, str]] = {}
        for name in own:
            source = next((other for other in groups[name] if other in given), None)
            if source is not None:
                _require_shape(folder, name, given[source].shape(folder, source), own[name])
                for place in base.names[name]:
                    sources.setdefault(firsts[place], (given[source], source))
        return Pretrained(folder, Initialized(model, seed), sources)

    def fill(self, target: Target, wanted: Collection[str]) -> None:
        self._initialized.fill(target, [name for name in wanted if name not in self._sources])
        targets: dict[int, list[str]] = {}
        for name in wanted:
            if name in self._sources:
                targets.setdefault(id(self._sources[name][0]), []).append(name)
        found = {id(one): one for one, _ in self._sources.values() if id(one) in targets}
        try:
            for one in by_file(list(found.values()), self.folder):
                for name in targets[id(one)]:
                    self._fill_one(target, name, one)
        finally:
            self.folder.close()

    def _fill_one(self, target: Target, name: str, conversion: Conversion) -> None:
        part = target.part_of(name)
        for piece, value in conversion.read(self.folder, self._sources[name][1], part):
            within = tuple(
                slice(there.start - own.start, there.stop - own.start) for there, own in zip(piece, part, strict=True)
            )
            target.take(name, value, within)

    def described(self) -> str:
        return f"files {self.folder.described()}, {self._initialized.described()}"


def _conversions(
    model: nn.Module, own: Mapping[str, Tensor], folder: SafetensorsFolder
) -> tuple[Sequence[Conversion], set[str]]:
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return conversions(model, own, folder)
    known = [key for key in folder.names() if key in own]
    return [Renamed(key, key) for key in known], {key for key in folder.names() if key not in own}


def _tied(model: nn.Module, own: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The names of one tensor, by each of them: the one that transformers ties the others to is the first."""
    from transformers import PreTrainedModel

    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    copies = model.all_tied_weights_keys if isinstance(model, PreTrainedModel) else {}
    groups: dict[int, list[str]] = {}
    for name in own:
        groups.setdefault(id(tensors.get(name, own[name])), []).append(name)
    return {name: sorted(group, key=lambda n: n in copies) for group in groups.values() for name in group}


def _adjusted(model: nn.Module, missing: set[str], unexpected: set[str]) -> tuple[set[str], set[str]]:
    """Without what transformers ignores for this model."""
    from transformers import PreTrainedModel
    from transformers.utils.loading_report import LoadStateDictInfo

    if not isinstance(model, PreTrainedModel):
        return missing, unexpected
    info = LoadStateDictInfo(
        missing_keys=missing, unexpected_keys=unexpected, mismatched_keys=set(), error_msgs=[], conversion_errors={},
        skipped_pp_keys=set(),
    )  # fmt: skip
    model._adjust_missing_and_unexpected_keys(info)
    return info.missing_keys, info.unexpected_keys


def _require_all(folder: SafetensorsFolder, model: nn.Module, missing: set[str], unexpected: set[str]) -> None:
    texts = []
    for what, names in (("no", missing), ("unexpected", unexpected)):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            texts.append(f"{what} {', '.join(sorted(names)[:_SHOWN])}{more}")
    if texts:
        raise InputError(f"{folder.path} does not fit {type(model).__name__}: it has {'; '.join(texts)}")


def _require_shape(folder: SafetensorsFolder, name: str, shape: tuple[int, ...], own: Tensor) -> None:
    if shape != tuple(own.shape):
        raise InputError(f"{folder.path} has {name} of shape {list(shape)}, the model {list(own.shape)}")


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> the first one of the same tensor."""
    found: dict[int, str] = {}
    names = {}
    for tensors in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in tensors:
            names[name] = found.setdefault(id(tensor), name)
    return names
