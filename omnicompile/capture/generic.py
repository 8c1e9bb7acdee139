"""Sizes for a capture whose every dimension can be read back (see symbols.py)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy
from torch import nn

from omnicompile.capture.inputs.types import ExampleInputs, InputConstraints, InputRequest, Rows
from omnicompile.capture.symbols import GenericSize
from omnicompile.program import Sym
from omnicompile.workload import Workload

# Primes that together divide no usual model dimension. The grid's factor 4 makes windows of common sizes come out
# even. 13 is none of them: it is what convolutions of stride 2 leave of the 100 frames of a second.
_IMAGES, _CLIPS, _GRID, _FRAMES = (23, 29), (11, 17), ((5, 7), (7, 11)), (17, 11)
_GRID_FACTOR = 4
_TEXT_MARGIN = 1000


@dataclass(frozen=True)
class GenericSizes:
    """The request for a capture. rows_fixed: the length of a text row that could not be made generic, else 0.
    grid_fixed / frames_fixed: the model takes one size of image or clip only, so that its patches or frames are a
    dimension of the model and not of the workload."""

    request: InputRequest
    rows_fixed: int = 0
    grid_fixed: bool = False
    frames_fixed: bool = False


def generic_request(limits: InputConstraints, workload: Workload, variant: int = 0) -> GenericSizes:
    """Numbers for a capture. variant: 1 gives another set, to check a capture by another."""
    images = _IMAGES[variant] if limits.images is not None else 0
    clips = _CLIPS[variant] if limits.audio is not None else 0
    grid = None
    patches = 0
    if limits.images is not None:
        factors = _GRID[variant]
        grid = limits.images.grid
        if grid is None:
            rows, cols = (m * _GRID_FACTOR * f for m, f in zip(limits.images.multiple, factors))
            grid = (rows, cols)
        patches = grid[0] * grid[1]
    frames = None
    if limits.audio is not None:
        prime = _FRAMES[variant]
        frames = limits.audio.frames or limits.audio.multiple * prime * max(1, 100 // limits.audio.multiple)
    fixed = (
        limits.images is not None and limits.images.grid is not None,
        limits.audio is not None and limits.audio.frames is not None,
    )
    if limits.rows is not Rows.SAMPLES:
        # One text per image or clip: its length is bound by the model, and stays as it will be.
        length = min(workload.seq_len, limits.max_seq_len or workload.seq_len)
        return GenericSizes(InputRequest(length, images, grid, frames, clips), length, *fixed)
    needed = images * patches + clips * (frames or 0) + _TEXT_MARGIN * (1 + variant)
    if limits.max_seq_len is not None and needed > limits.max_seq_len:
        seq_len = int(sympy.prevprime(limits.max_seq_len + 1 - variant * 8))
    else:
        seq_len = int(sympy.nextprime(needed))
    return GenericSizes(InputRequest(seq_len, images, grid, frames, clips), 0, *fixed)


def lengthened(sizes: GenericSizes, needed: int) -> GenericSizes:
    """The same numbers with text rows that hold `needed` placeholders."""
    return replace(sizes, request=replace(sizes.request, seq_len=int(sympy.nextprime(needed + _TEXT_MARGIN))))


def shortened(sizes: GenericSizes, inputs: ExampleInputs) -> GenericSizes:
    """The same numbers with text rows no longer than the placeholders of `inputs` need."""
    needed = inputs.images * inputs.tokens_per_image + inputs.clips * inputs.tokens_per_clip
    return lengthened(sizes, needed + 2 * (inputs.images + inputs.clips))


def loops_over_tokens(model: nn.Module) -> bool:
    """Whether a model has recurrent layers, whose forward in Python takes a step for every few tokens. They have a
    short depthwise convolution over the sequence in front. Such steps are priced in the number that the capture has:
    nothing in the graph says how many there would be at another length."""
    return any(m.groups > 1 and m.groups == m.in_channels for m in model.modules() if isinstance(m, nn.Conv1d))


def generic_sizes(inputs: ExampleInputs, sizes: GenericSizes) -> list[GenericSize]:
    """The symbols of a capture with the factors that mark them."""
    found = []
    if sizes.rows_fixed:
        tokens = inputs.rows * inputs.seq_len
        found.append(GenericSize(Sym.S, tokens, tokens))
    else:
        found.append(GenericSize(Sym.S, inputs.seq_len, inputs.seq_len))
    if inputs.images:
        found.append(GenericSize(Sym.I, inputs.images, inputs.images))
        if inputs.patches_per_image and not sizes.grid_fixed:
            patches = inputs.patches_per_image
            grid = sizes.request.image_grid or (0, 0)
            mark = inputs.images * _odd_part(patches)
            found.append(GenericSize(Sym.N, inputs.images * patches, mark, patches, grid))
    if inputs.clips:
        found.append(GenericSize(Sym.C, inputs.clips, inputs.clips))
        if inputs.frames_per_clip and not sizes.frames_fixed:
            frames = inputs.frames_per_clip
            found.append(GenericSize(Sym.A, inputs.clips * frames, inputs.clips * _odd_part(frames, (2, 5)), frames))
    return found


def _odd_part(number: int, factors: tuple[int, ...] = (2,)) -> int:
    """What is left of a size without the factors that merging, striding and windowing take from it."""
    for factor in factors:
        while number % factor == 0:
            number //= factor
    return number
