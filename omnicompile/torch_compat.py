"""Every use of a private torch API, in one place. `tests/test_torch_compat.py` holds a canary for each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.fx.experimental.symbolic_shapes import ShapeEnv

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "is_plain_host_tensor",
    "new_fake_mode",
    "outside_tracing",
]


def new_fake_mode(static_shapes: bool = True) -> FakeTensorMode:
    """A FakeTensorMode with a ShapeEnv, which boolean indexing in a joint trace needs."""
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=static_shapes)


def is_plain_host_tensor(value: object) -> bool:
    """True for an ordinary CPU tensor that no tracing mode has wrapped and that carries no gradient."""
    return (
        type(value) is torch.Tensor
        and value.device.type == "cpu"
        and not value.requires_grad
        and not torch._is_functional_tensor(value)
        and not torch._C._functorch.is_functorch_wrapped_tensor(value)
    )


@contextlib.contextmanager
def outside_tracing() -> Iterator[None]:
    """Run what is inside for real, although a fake mode, a proxy mode or a torch-function mode is active."""
    with unset_fake_temporarily(), disable_proxy_modes_tracing(), torch._C.DisableTorchFunction():
        yield
