"""Random number generators that training draws from: torch's default CPU generator, of which rank 0's counts
(docs/runtime.md), and that of the device where a single process runs the plain model."""

from __future__ import annotations

import base64
from collections.abc import Mapping

import torch
from torch import Tensor


def random_state(device: torch.device) -> dict[str, str]:
    """In text, by kind of device."""
    found = {"cpu": _text(torch.get_rng_state())}
    if device.type == "cuda":
        found["cuda"] = _text(torch.cuda.get_rng_state(device))
    return found


def set_random_state(state: Mapping[str, str], device: torch.device) -> None:
    torch.set_rng_state(_tensor(state["cpu"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_tensor(state["cuda"]), device)


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
