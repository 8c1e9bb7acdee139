"""Omni-modal models composed of encoders, a language model and decoders, declared in a file (docs/omni.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omnicompile.omni.config import OmniConfig
    from omnicompile.omni.declared import build, read_config
    from omnicompile.omni.gathered import gather_into
    from omnicompile.omni.model import OmniModel
    from omnicompile.omni.processor import Item, OmniProcessor, Text

_WHERE = {
    "build": "declared",
    "read_config": "declared",
    "OmniConfig": "config",
    "OmniModel": "model",
    "OmniProcessor": "processor",
    "Text": "processor",
    "Item": "processor",
    "gather_into": "gathered",
}
__all__ = ["Item", "OmniConfig", "OmniModel", "OmniProcessor", "Text", "build", "gather_into", "read_config"]


def __getattr__(name: str) -> Any:
    """Importing the package does not import torch."""
    if name not in _WHERE:
        raise AttributeError(f"omnicompile.omni has no {name}")
    import importlib

    return getattr(importlib.import_module(f"omnicompile.omni.{_WHERE[name]}"), name)
