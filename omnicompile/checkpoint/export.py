"""Weights in Hugging Face's format: a folder that `from_pretrained` loads."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from omnicompile.checkpoint.contents import Module
from omnicompile.checkpoint.ranks import Ranks
from omnicompile.errors import CheckpointError, InputError
from omnicompile.runtime.adapters import adapted
from omnicompile.runtime.safetensors_folder import INDEX, SINGLE

_SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def export_huggingface(
    module: Module,
    folder: Path | str,
    processor: Any = None,
    max_file_bytes: int = 5_000_000_000,
    dtype: torch.dtype | None = None,
) -> None:
    """Write model, configuration and `processor` into `folder`, in the layout that the model's checkpoints have.

    All ranks call it together; rank 0 writes and holds one file of at most `max_file_bytes` at a time (more where one
    conversion gives more). dtype: of the written weights, None for the configuration's. A model with PEFT adapters is
    written as PeftModel's save_pretrained does, the adapters alone. Raises InputError for a model that is not of
    transformers or a folder that cannot be written, CheckpointError when writing fails, on every rank.
    """
    ranks, target = Ranks.start(), Path(folder)
    ranks.first(lambda: _start(module, target))
    model: Any = module.plain_model
    if adapted(model) is not None:
        _export_adapters(module, model, target, ranks)
    else:
        _export_model(module, model, target, ranks, max_file_bytes, dtype or _configured_dtype(model))
    if processor is not None:
        ranks.first(lambda: _save_processor(processor, target))


def _save_processor(processor: Any, folder: Path) -> None:
    processor.save_pretrained(folder)


def _start(module: Module, folder: Path) -> None:
    from transformers import PreTrainedModel

    model: Any = module.plain_model
    if not isinstance(model, PreTrainedModel) and adapted(model) is None:
        raise InputError(f"{type(model).__name__} is not a model of transformers: export its state_dict() yourself")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from error


def _configured_dtype(model: Any) -> torch.dtype:
    dtype = model.config.dtype or torch.float32
    return vars(torch)[dtype] if isinstance(dtype, str) else dtype  # a name, once the configuration has been saved


def _whole(value: Tensor) -> Tensor:
    """On every rank (a collective where ranks hold parts)."""
    return value.full_tensor() if isinstance(value, DTensor) else value


@dataclass
class _Files:
    """Writes safetensors of at most `limit` bytes each into `folder`, then names them and the index."""

    folder: Path
    limit: int
    held: dict[str, Tensor] = field(default_factory=dict)
    written: list[list[str]] = field(default_factory=list)
    total: int = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        new = sum(_bytes(value) for value in tensors.values())
        if self.held and new + sum(map(_bytes, self.held.values())) > self.limit:
            self.write()
        self.held |= {name: value.contiguous() for name, value in tensors.items()}
        self.total += new

    def write(self) -> None:
        if self.held:
            save_file(self.held, self._temporary(len(self.written)), metadata={"format": "pt"})
            self.written.append(sorted(self.held))
            self.held = {}

    def _temporary(self, number: int) -> Path:
        return self.folder / f".writing-{number:05d}.safetensors"

    def finish(self) -> None:
        self.write()
        for old in self.folder.glob("*.safetensors"):
            if old.name == SINGLE or _SHARD_NAME.fullmatch(old.name):
                old.unlink()
        (self.folder / INDEX).unlink(missing_ok=True)
        count = len(self.written)
        names = [SINGLE] if count == 1 else [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
        for number, name in enumerate(names):
            os.replace(self._temporary(number), self.folder / name)
        if count > 1:
            where = {key: names[number] for number, keys in enumerate(self.written) for key in keys}
            index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(where.items()))}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def discard(self) -> None:
        for left in self.folder.glob(".writing-*.safetensors"):
            left.unlink(missing_ok=True)


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _export_model(module: Module, model: Any, folder: Path, ranks: Ranks, limit: int, dtype: torch.dtype) -> None:
    values = _values(module, model)
    files = _Files(folder, limit)
    failure: Exception | None = None
    for group in _conversion_groups(model, list(values)):
        whole = {name: _whole(values[name]) for name in group.names}
        if ranks.rank == 0 and failure is None:
            try:
                cast = {n: v.detach().to("cpu", dtype if v.is_floating_point() else v.dtype) for n, v in whole.items()}
                files.add(group.converted(cast, model))
            except Exception as error:  # the other ranks go on to gather
                failure = error
        del whole

    def finish() -> None:
        try:
            if failure is not None:
                raise failure
            files.finish()
            _save_configuration(model, folder, dtype)
        except Exception as error:
            files.discard()
            raise CheckpointError(f"could not write to {folder}: {type(error).__name__}: {error}") from error

    ranks.first(finish)


def _values(module: Module, model: Any) -> dict[str, Tensor]:
    """What transformers would save: of tied parameters the one that the others are tied to."""
    found = {name: module.as_whole(name, value) for name, value in module.stored().items()} | module.stored_buffers()
    ignored = model._keys_to_ignore_on_save or ()
    return {model.all_tied_weights_keys.get(name, name): value for name, value in found.items() if name not in ignored}


def _save_configuration(model: Any, folder: Path, dtype: torch.dtype) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


@dataclass(frozen=True)
class _Group:
    """Parameters that one conversion of transformers takes together. patterns: by name, that its key fits; none for
    one that is only renamed. key: what the conversion is called by."""

    key: str
    converter: Any
    patterns: dict[str, str]
    renamings: Sequence[Any]

    @property
    def names(self) -> list[str]:
        return list(self.patterns)

    def converted(self, tensors: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
        """By name in the checkpoint."""
        from transformers.core_model_loading import apply_renamings

        if self.converter is None:
            (name,) = self.names
            return {self.key: tensors[name]}
        converter = copy.deepcopy(self.converter)
        for name, pattern in self.patterns.items():
            converter.add_tensor(self.key, name, pattern, tensors[name])
        made = converter.convert(self.key, model=model, config=model.config)
        values = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        return {apply_renamings(name, self.renamings): value for name, value in values.items()}


def _conversion_groups(model: Any, names: Sequence[str]) -> Iterator[_Group]:
    """The reverse of the conversions by which transformers loads this model's checkpoints, as it saves them itself."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        PrefixChange,
        WeightConverter,
        WeightRenaming,
        apply_converters,
        apply_renamings,
        dot_natural_key,
    )

    # A prefix that some checkpoints have and others have not is not put back; nor are names of old versions.
    mapping = [e for e in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(e, PrefixChange)]
    reverse = [entry.reverse_transform() for entry in mapping[::-1]]
    renamings = [entry for entry in reverse if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in reverse if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    groups: dict[str, _Group] = {}
    for name in sorted(names, key=dot_natural_key):
        key, pattern = apply_converters(name, converters)
        if pattern is None:
            key = apply_renamings(name, renamings)
            groups[f"={key}"] = _Group(key, None, {name: ""}, renamings)
        else:
            group = groups.setdefault(key, _Group(key, by_pattern[pattern], {}, renamings))
            group.patterns[name] = pattern
    yield from groups.values()


def _export_adapters(module: Module, model: Any, folder: Path, ranks: Ranks) -> None:
    chosen = ranks.first(lambda: _adapter_names(model, list(module.stored())))
    parameters, whole = module.stored(), {}
    for name in chosen:
        value = _whole(module.as_whole(name, parameters[name]))
        if ranks.rank == 0:
            whole[name] = value.detach().cpu()

    def write() -> None:
        try:
            model.save_pretrained(folder, state_dict=whole)
        except Exception as error:
            raise CheckpointError(f"could not write to {folder}: {type(error).__name__}: {error}") from error

    ranks.first(write)


def _adapter_names(model: Any, names: Sequence[str]) -> list[str]:
    """Those of `names` that PEFT saves."""
    from peft import get_peft_model_state_dict

    stand_ins = {name: torch.empty(0) for name in names}
    saved = set()
    for adapter in model.peft_config:
        saved |= {id(value) for value in get_peft_model_state_dict(model, stand_ins, adapter).values()}
    return [name for name, value in stand_ins.items() if id(value) in saved]
