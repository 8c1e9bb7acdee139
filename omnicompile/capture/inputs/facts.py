"""Facts read from a Hugging Face configuration and a forward signature, by the names that models share."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from omnicompile.errors import CaptureError

IMAGE_CONFIGS = re.compile(r"vision|image|visual|vq|sam_config|^encoder$|^vlm_config$")
AUDIO_CONFIGS = re.compile(r"audio|speech|asr|acoustic|encoder_config|codec")
TEXT_CONFIGS = re.compile(r"text|decoder|language|llm|talker|dit")


def sub_configs(config: Any, pattern: re.Pattern[str] | None = None) -> Iterator[tuple[str, Any]]:
    """(attribute, configuration) pairs nested one level down, those whose attribute matches `pattern`."""
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and (pattern is None or pattern.search(name)):
            yield name, value


def tower_configs(config: Any, pattern: re.Pattern[str]) -> tuple[Any, ...]:
    """The configurations of a modality's towers, outermost first, then what is nested in them, then `config`."""
    found: list[Any] = []

    def walk(node: Any) -> None:
        found.append(node)
        for name, child in sub_configs(node):
            if not TEXT_CONFIGS.search(name):
                walk(child)

    for _, tower in sub_configs(config, pattern):
        walk(tower)
    return (*found, config)


@dataclass(frozen=True)
class Facts:
    """arguments: names that the forward takes. config: the model's own. text: that of its language backbone."""

    model: nn.Module
    arguments: frozenset[str]
    config: Any
    text: Any
    image_configs: tuple[Any, ...]
    audio_configs: tuple[Any, ...]
    dtype: torch.dtype

    @staticmethod
    def of(model: nn.Module) -> Facts:
        config = getattr(model, "config", None)
        if config is None or not hasattr(config, "get_text_config"):
            parameters = inspect.signature(model.forward).parameters.values()
            required = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
            raise CaptureError(
                f"cannot guess the forward arguments {', '.join(required)} of {type(model).__name__}, which has no "
                "Hugging Face configuration: give a function inputs() that returns them as a dict"
            )
        arguments = frozenset(inspect.signature(model.forward).parameters) - {"self", "args", "kwargs"}
        floats = (p.dtype for p in model.parameters() if p.dtype.is_floating_point)
        return Facts(
            model=model,
            arguments=arguments,
            config=config,
            text=text_config(config),
            image_configs=tower_configs(config, IMAGE_CONFIGS),
            audio_configs=tower_configs(config, AUDIO_CONFIGS),
            dtype=next(floats, torch.float32),
        )

    def first_argument(self, *names: str) -> str | None:
        return next((name for name in names if name in self.arguments), None)


def text_config(config: Any) -> Any:
    """The configuration of the language backbone (of the decoder where there are two)."""
    try:
        return config.get_text_config(decoder=True)
    except (ValueError, TypeError, AttributeError):
        return config.get_text_config() if not hasattr(config, "decoder") else config.decoder


def first_value(configs: Iterable[Any], *names: str) -> Any:
    """The first of the fields `names` that any of `configs` (searched in order) sets to something else than None."""
    for config in configs:
        for name in names:
            value = getattr(config, name, None)
            if value is not None:
                return value
    return None


def pair(value: Any) -> tuple[int, int]:
    """(height, width) from a number, a pair, or a mapping with "height" and "width"."""
    if isinstance(value, dict):
        return int(value["height"]), int(value["width"])
    if isinstance(value, (list, tuple)):
        return int(value[0]), int(value[-1])
    return int(value), int(value)


def special_ids(config: Any) -> set[int]:
    """Every token id that the configuration or one nested in it gives a meaning to."""
    found: set[int] = set()
    for name, value in vars(config).items():
        if re.search(r"token_(id|index)$|_id$|_token$", name):
            values = value if isinstance(value, (list, tuple)) else [value]
            found |= {v for v in values if isinstance(v, int) and not isinstance(v, bool)}
    for _, nested in sub_configs(config):
        found |= special_ids(nested)
    return found


def placeholder_id(facts: Facts, modality: str) -> int | None:
    """The token id that stands for a feature of `modality` ("image", "audio") in the text."""
    names = [f"{modality}_token_id", f"{modality}_token_index", f"{modality}_patch_id", f"{modality}_pad_token_id"]
    configs = (facts.config, *(facts.image_configs if modality == "image" else facts.audio_configs))
    value = first_value(configs, *names)
    return int(value) if isinstance(value, int) else None
