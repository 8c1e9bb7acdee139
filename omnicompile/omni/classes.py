"""Classes and sizes that a declaration names."""

from __future__ import annotations

import importlib
import math
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from omnicompile.errors import InputError


def import_class(path: str, where: str) -> Any:
    """The class at "package.module.Class". Raises InputError if there is none."""
    module_name, _, class_name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{where}: there is no class {path}: give it as package.module.Class") from error


def find_class(name: str, where: str) -> type[PreTrainedModel]:
    """The model class called `name`: one that transformers exports (`ViTModel`), one of a model family of it
    (`vit.ViTModel`), or any other by its path (`package.module.Class`). where: for errors.

    Raises InputError if there is none, or if it is no PreTrainedModel.
    """
    import transformers

    module_name, _, class_name = str(name).rpartition(".")
    try:
        if not module_name:
            found = getattr(transformers, class_name)
        else:
            family = f"transformers.models.{module_name}.modeling_{module_name}"
            found = getattr(importlib.import_module(module_name if "." in module_name else family), class_name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"{where}: there is no class {name}: give one that transformers exports (ViTModel), one of its "
            "model families (vit.ViTModel), or package.module.Class"
        ) from error
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise InputError(f"{where}: {name} is not a PreTrainedModel class")
    return found


def make_config(cls: type[PreTrainedModel], fields: dict[str, Any], where: str) -> PretrainedConfig:
    """The class's own configuration with these fields. Raises InputError where the class has none or refuses them."""
    if cls.config_class is None:
        raise InputError(f"{where}: {cls.__name__} has no configuration class")
    known = set(cls.config_class().to_dict()) | set(cls.config_class.attribute_map)
    if unknown := sorted(set(fields) - known - {"model_type"}):
        raise InputError(f"{where}: {cls.config_class.__name__} has no field {unknown[0]}")
    try:
        return cls.config_class(**fields)
    except Exception as error:  # of the configuration's own checks
        first = str(error).strip().splitlines()
        raise InputError(
            f"{where}: {cls.config_class.__name__}: {first[-1] if first else type(error).__name__}"
        ) from error


def size_of(value: int | str, config: PretrainedConfig, where: str) -> int:
    """A number, or a product of numbers and fields of `config` such as "2*max_source_positions"."""
    if isinstance(value, int):
        return value
    factors = []
    for word in (part.strip() for part in str(value).split("*")):
        known = config.to_dict() | {alias: getattr(config, field) for alias, field in config.attribute_map.items()}
        number = int(word) if word.isdigit() else known.get(word)
        if not isinstance(number, int):
            raise InputError(
                f"{where}: {word!r} in {value!r} is neither a number nor a field of {type(config).__name__} that is one"
            )
        factors.append(number)
    return math.prod(factors)
