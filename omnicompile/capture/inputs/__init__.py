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
    StatesInputs,
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
    "StatesInputs",
    "input_constraints",
    "make_inputs",
]


def input_constraints(model: nn.Module) -> InputConstraints:
    """What the model's forward puts on the sizes of its inputs; see `constraints.py`."""
    if isinstance(model, StatesInputs):
        return model.input_constraints()
    from omnicompile.capture.inputs import constraints

    return constraints.input_constraints(model)


def make_inputs(
    model: nn.Module, sample: InputRequest, check: bool = True, limits: InputConstraints | None = None
) -> ExampleInputs:
    """Arguments for the model's forward with exactly the numbers of `sample`; see `make.py`."""
    if isinstance(model, StatesInputs):
        return model.example_inputs(sample)
    from omnicompile.capture.inputs import make

    return make.make_inputs(model, sample, check, limits)
