"""Adapters that PEFT has put into a model: how they are initialized, and where the base model's parameters are.

PEFT is imported only if somebody has: without it there are no adapters.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from omnicompile.errors import InputError


def defined_method(module: nn.Module, name: str) -> Callable[[Any], Any] | None:
    """As the module's class or one that it inherits from defines it."""
    return next((vars(kind)[name] for kind in type(module).__mro__ if name in vars(kind)), None)


def adapter_configs(model: nn.Module) -> dict[str, Any]:
    """Of the adapters that PEFT has put into `model`, by name."""
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.tuners_utils import BaseTuner

    return {name: found for m in model.modules() if isinstance(m, BaseTuner) for name, found in m.peft_config.items()}


def adapter_initializers(module: nn.Module, configs: Mapping[str, Any]) -> list[Callable[[], Any]] | None:
    """Of a layer with LoRA adapters; None for any other module. Modules inside the adapters are reset before.

    Raises InputError for adapters that are initialized from the weights of the base model.
    """
    if not configs:
        return None
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(module, BaseTunerLayer):
        return None
    layer: nn.Module = module  # PEFT's layers are a module and this
    base = {id(child) for child in layer.get_submodule("base_layer").modules()}
    if not isinstance(module, LoraLayer):
        kept = {id(value) for value in layer.get_submodule("base_layer").parameters()}
        if any(value.is_meta and id(value) not in kept for value in layer.parameters()):
            raise InputError(
                f"adapters of {type(module).__name__} are on the meta device, which works for LoRA only: load the base "
                "model before get_peft_model"
            )
        return []
    calls: list[Callable[[], Any]] = []
    for child in layer.modules():
        reset = defined_method(child, "reset_parameters")
        if reset is not None and child is not module and id(child) not in base:
            calls.append(partial(reset, child))
    for adapter in module.r:
        how = configs[adapter].init_lora_weights
        if how not in (True, False, "gaussian"):
            raise InputError(
                f"adapter {adapter} is initialized by {how!r}, from the weights of the base model, which are on the "
                "meta device: choose init_lora_weights=True, or load the base model before get_peft_model"
            )
        calls.append(partial(module.reset_lora_parameters, adapter, how))
    return calls


def adapted(model: nn.Module) -> tuple[str, Any] | None:
    """The model inside PEFT's wrapper, and its path; None for a model without one."""
    if "peft" not in sys.modules:
        return None
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return None
    base = model.get_base_model()
    path = next(name for name, module in model.named_modules() if module is base)
    return path, base


def names_with_adapters(model: nn.Module, prefix: str, plain: nn.Module) -> dict[str, tuple[str, ...]]:
    """Names of the plain model's state dict -> where PEFT has put them: `base_layer` of a layer with adapters,
    `original_module` and copies of a module that is trained whole."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    moved: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            moved[path] = [f"{path}.base_layer"]
        elif isinstance(module, ModulesToSaveWrapper):
            copies = [f"{path}.modules_to_save.{name}" for name in module.modules_to_save]
            moved[path] = [f"{path}.original_module", *copies]
    known = set(model.state_dict())
    found = {}
    for name in plain.state_dict():
        places = [f"{prefix}.{name}"]
        for path in sorted(moved, key=len, reverse=True):
            if places[0].startswith(f"{path}."):
                places = [f"{new}.{places[0].removeprefix(f'{path}.')}" for new in moved[path]]
                break
        found[name] = tuple(place for place in places if place in known)
        if not found[name]:
            raise InputError(f"{name} is not found in the model with adapters: this kind of adapter is not supported")
    return found
