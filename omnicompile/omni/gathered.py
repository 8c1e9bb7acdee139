"""The plain model with the weights of a distributed one, to generate with or to save."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from omnicompile.errors import InputError


def gather_into(model: nn.Module, module: nn.Module) -> nn.Module:
    """Put the present weights of `module` (as `parallelize` returns it) into `model`, which is of the same structure,
    and return it. Collective: all ranks of `module` must call it, and each has the whole model afterwards.

    Raises InputError naming a parameter that one of them has and the other has not.
    """
    state: Mapping[str, Any] = module.state_dict()
    whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}
    missing, unexpected = model.load_state_dict(
        {name: value for name, value in whole.items() if isinstance(value, Tensor)}, strict=False
    )
    if missing or unexpected:
        raise InputError(f"the models differ in {[*missing, *unexpected][0]}: build both from one configuration")
    return model
