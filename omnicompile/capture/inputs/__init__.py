"""Example inputs for any Hugging Face model. Importing this package does not import torch: cached captures load
fast."""

from __future__ import annotations

from typing import TYPE_CHECKING

from omnicompile.capture.inputs.types import (
    AudioConstraints,
    ExampleInputs,
    FloatSpec,
    ImageConstraints,
    InputConstraints,
    InputRequest,
    Merge,
    Rows,
)

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "AudioConstraints",
    "ExampleInputs",
    "FloatSpec",
    "ImageConstraints",
    "InputConstraints",
    "InputRequest",
    "Merge",
    "Rows",
    "input_constraints",
    "make_inputs",
]


def input_constraints(model: nn.Module) -> InputConstraints:
    """What the model's forward puts on the sizes of its inputs; see `constraints.py`."""
    from omnicompile.capture.inputs import constraints

    return constraints.input_constraints(model)


def make_inputs(
    model: nn.Module, sample: InputRequest, check: bool = True, limits: InputConstraints | None = None
) -> ExampleInputs:
    """Arguments for the model's forward with exactly the numbers of `sample`; see `make.py`."""
    from omnicompile.capture.inputs import make

    return make.make_inputs(model, sample, check, limits)
