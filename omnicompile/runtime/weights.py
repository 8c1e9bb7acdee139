"""Values for a model that was built on the meta device."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from omnicompile.errors import InputError


def on_meta(model: nn.Module) -> bool:
    return any(tensor.device.type == "meta" for tensor in (*model.parameters(), *model.buffers()))


def materialized(model: nn.Module, seed: int) -> nn.Module:
    """A copy of a meta model in host memory, with the values of the model's own initialization.

    The same on every rank for the same `seed`. Raises InputError naming a module whose parameters nobody initializes.
    """
    made = copy.deepcopy(model).to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        if _initializes_itself(made):
            made.init_weights()
        else:
            for name, module in made.named_modules():
                _reset(name, module)
    made.train(model.training)
    return made


def _initializes_itself(model: Any) -> bool:
    """Hugging Face models initialize all their modules, buffers included."""
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def _reset(name: str, module: Any) -> None:
    own = [*module._parameters.values(), *module._buffers.values()]
    if not any(tensor is not None for tensor in own):
        return
    if not callable(getattr(module, "reset_parameters", None)):
        raise InputError(
            f"{type(module).__name__} ({name or 'the model'}) is on the meta device and has no reset_parameters(): "
            "give the model weights before parallelize"
        )
    module.reset_parameters()
