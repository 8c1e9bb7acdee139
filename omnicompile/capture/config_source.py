"""Models from a Hugging Face config.json: which class it means, and how to build it. Nothing is downloaded."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnicompile.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

# The first mapping that knows a model type gives its class: those whose classes have a language-modelling loss first.
MAPPINGS = (
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_PRETRAINING_MAPPING_NAMES",
    "MODEL_FOR_CTC_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)


def config_file(path: Path) -> Path:
    """The config.json that `path` is or holds."""
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        return file
    raise InputError(f"directory {path} holds no config.json" if path.is_dir() else f"{path} does not exist")


def read_config(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{file}:{error.lineno}: malformed JSON: {error.msg}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file}: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{file}: must be a JSON object, and is a {type(data).__name__}")
    return data


def config_name(data: Mapping[str, Any], file: Path) -> str:
    """A name for reports, without importing transformers."""
    return str(_architecture(data) or data.get("model_type") or file.resolve().parent.name)


def build(data: Mapping[str, Any], file: Path) -> torch.nn.Module:
    """The model that a config.json describes, in bfloat16, on the device of the surrounding context."""
    model_class, config = resolve(data, file)
    return _instantiate(model_class, config)


def resolve(data: Mapping[str, Any], file: Path) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """Class and configuration: by `architectures`, else by the auto mappings of `model_type`. A class that only
    coordinates parts and has no forward of its own gives way to its first part that has one."""
    architecture = _architecture(data)
    config = _config_of(data, file)
    if architecture is not None:
        model_class = _transformers_class(architecture, data, file)
        if config is None:
            config = model_class.config_class.from_dict(dict(data))
    elif config is not None:
        model_class = _mapped_class(config, file)
    else:
        raise InputError(f"{file}: has neither model_type nor architectures, so that the model's class is unknown")
    return with_forward(model_class, config, str(file))


def with_forward(
    model_class: type[PreTrainedModel], config: PretrainedConfig, origin: str
) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """The class and configuration themselves, or those of the first part that has a forward. origin: for the error."""
    import transformers

    if _has_forward(model_class):
        return model_class, config
    for key in config.sub_configs:
        part = vars(config).get(key)
        if isinstance(part, transformers.PretrainedConfig) and (name := _mapped_name(part.model_type)):
            part_class = _transformers_class(name, {}, Path(origin))
            if _has_forward(part_class):
                return part_class, part
    raise InputError(f"{origin}: {model_class.__name__} has no forward to trace; name the part to plan by its class")


def builder(
    target: Any, data: Mapping[str, Any] | None, spec: str, config: str | None
) -> Callable[[], torch.nn.Module]:
    """How to call what `package.module:Class` names: a Hugging Face class with its configuration, any other class or
    function with the entries of the config.json as keyword arguments."""
    if not _is_hugging_face(target):
        return lambda: target(**(data or {}))
    if data is None or config is None:
        raise InputError(f"{spec} needs its configuration: add --config config.json")
    part = _part_for(target.config_class.model_type, data)
    if part is None:
        raise InputError(
            f"{config}: is a configuration of model type {data.get('model_type')!r}, "
            f"and {target.__name__} takes {target.config_class.model_type!r}"
        )
    return lambda: _instantiate(*with_forward(target, target.config_class.from_dict(dict(part)), spec))


def _instantiate(model_class: type[PreTrainedModel], config: PretrainedConfig) -> torch.nn.Module:
    import torch

    model: torch.nn.Module = model_class._from_config(config, dtype=torch.bfloat16)
    return model


def _is_hugging_face(target: Any) -> bool:
    if "transformers" not in sys.modules or not isinstance(target, type):
        return False
    from transformers import PreTrainedModel

    return issubclass(target, PreTrainedModel)


def _part_for(model_type: str, data: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """`data`, or the nested configuration in it that is of `model_type`."""
    if data.get("model_type", model_type) == model_type:
        return data
    for value in data.values():
        if isinstance(value, dict) and "model_type" in value and (part := _part_for(model_type, value)) is not None:
            return part
    return None


def _architecture(data: Mapping[str, Any]) -> str | None:
    names = data.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else None


def _config_of(data: Mapping[str, Any], file: Path) -> PretrainedConfig | None:
    from transformers import CONFIG_MAPPING

    model_type = data.get("model_type")
    if model_type is None:
        return None
    if model_type not in CONFIG_MAPPING:
        raise InputError(
            f"{file}: unknown model_type {model_type!r}{_own_code(data)}{_close(model_type, CONFIG_MAPPING)}"
        )
    config_class: type[PretrainedConfig] = CONFIG_MAPPING[model_type]
    return config_class.from_dict(dict(data))


def _transformers_class(name: str, data: Mapping[str, Any], file: Path) -> type[PreTrainedModel]:
    import transformers

    try:
        found: type[PreTrainedModel] = getattr(transformers, name)  # transformers imports its classes on access
    except AttributeError as error:
        hint = _own_code(data) or _close(name, dir(transformers))
        raise InputError(f"{file}: unknown class {name!r} (architectures){hint}") from error
    return found


def _mapped_name(model_type: str) -> str | None:
    from transformers.models.auto import modeling_auto

    for mapping in MAPPINGS:
        found = vars(modeling_auto)[mapping].get(model_type)
        if found is not None:
            return str(found if isinstance(found, str) else found[0])
    return None


def _mapped_class(config: PretrainedConfig, file: Path) -> type[PreTrainedModel]:
    name = _mapped_name(config.model_type)
    if name is None:
        raise InputError(f"{file}: no model class is known for model_type {config.model_type!r}: add architectures")
    return _transformers_class(name, {}, file)


def _has_forward(model_class: type[torch.nn.Module]) -> bool:
    import torch

    return model_class.forward is not torch.nn.Module.forward


def _own_code(data: Mapping[str, Any]) -> str:
    if "auto_map" not in data:
        return ""
    return "; the model brings its own code (auto_map): install it and name it as package.module:Class --config FILE"


def _close(name: str, known: Any) -> str:
    close = get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ", which the installed transformers does not have"
