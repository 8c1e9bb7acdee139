"""Example inputs for any Hugging Face model."""

from omnicompile.capture.inputs.constraints import input_constraints
from omnicompile.capture.inputs.make import make_inputs
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
