"""Checkpoints of a training run, and export to Hugging Face."""

from omnicompile.checkpoint.checkpointer import Checkpointer, Restored
from omnicompile.checkpoint.export import export_huggingface

__all__ = ["Checkpointer", "Restored", "export_huggingface"]
