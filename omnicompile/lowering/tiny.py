"""A tiny-sized copy of a user's model with the same structure, with random weights and batches for it.

A Hugging Face model is built from a shrunk configuration. The file of another model may offer `tiny()`; without it the
model itself serves, if it is small enough.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from omnicompile.capture.inputs import FloatSpec, InputRequest, input_constraints, make_inputs
from omnicompile.capture.inputs.facts import special_ids
from omnicompile.capture.inputs.stand_ins import fill_placeholders
from omnicompile.capture.source import ModelSource
from omnicompile.errors import CaptureError, InputError, OmniCompileError
from omnicompile.lowering.graph_capture import find_outputs
from omnicompile.lowering.tiny_config import LEVELS, shrink
from omnicompile.workload import Workload

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = dict[str, Any]
_DTYPES = (torch.float64, torch.float32)  # float64 first: nothing hides in rounding
MOST_PARAMETERS = 50_000_000
_TEXT = 32  # text tokens beside the placeholders of images and audio
_MULTIPLE = 64  # sequence lengths are one, so that they can be cut
_PROBE_LENGTH = 4096


@dataclass(frozen=True)
class TinyModel:
    """model: on CPU, in train mode, with random weights. batch: a batch for data rank r; all have equal shapes, other
    values and other numbers of targets. notes: what differs from the user's model. even: such batches in which images
    have one shape on all ranks, where `batch` has them in other ones; a model may have another graph for each shape."""

    model: nn.Module
    batch: Callable[[int], Batch]
    notes: tuple[str, ...] = ()
    even: Callable[[int], Batch] | None = None


def tiny_copy(source: ModelSource, dtype: torch.dtype | None = None) -> TinyModel:
    """dtype: of the weights; None: float64, or float32 if the model's operators take no float64.

    Raises InputError or CaptureError naming the remedy when there is no way to a tiny copy.
    """
    if source.tiny is not None:
        return _own(source, source.tiny, dtype)
    model = source.build_meta()
    if is_hugging_face(model):
        return _shrunk(model, dtype)
    size = sum(p.numel() for p in model.parameters())
    if size > MOST_PARAMETERS:
        raise InputError(
            f"{source.spec}: has {size / 1e9:.2g} B parameters and no Hugging Face configuration to shrink: "
            "add def tiny() -> nn.Module to the file, the same model with small sizes"
        )
    return _own(source, source.build, dtype)


def is_hugging_face(model: nn.Module) -> TypeGuard[PreTrainedModel]:
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def _own(source: ModelSource, build: Callable[[], nn.Module], dtype: torch.dtype | None) -> TinyModel:
    inputs, workload = source.inputs, Workload(seq_len=1024, images=1, audio_seconds=1.0)
    failure: Exception | None = None
    for wanted in _DTYPES if dtype is None else (dtype,):
        model = _randomized(build().to(wanted))
        try:
            batch = _batches(model, wanted) if inputs is None else _given_batches(inputs, workload, wanted)
            _check_runs(model, batch(0))
        except OmniCompileError:
            raise
        except Exception as error:  # of the user's own code, or an operator without this dtype
            failure = error
            continue
        size = sum(p.numel() for p in model.parameters())
        origin = "the file's tiny()" if source.tiny is not None else "the model itself"
        notes = (origin, f"{size / 1e6:.2g} M parameters", str(wanted).removeprefix("torch."))
        return TinyModel(model, batch, notes)
    raise InputError(f"the tiny copy of {source.spec} does not run: {_line(failure)}") from failure


def _given_batches(
    inputs: Callable[[Workload | None], dict[str, Any]], workload: Workload, dtype: torch.dtype
) -> Callable[[int], Batch]:
    return lambda rank: _varied(_real(inputs(workload), dtype, rank), rank)


def _line(error: Exception | None) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _shrunk(original: PreTrainedModel, dtype: torch.dtype | None) -> TinyModel:
    """Less and less is made smaller until the copy runs, in float64 if that can be."""
    failures = []
    for level in LEVELS:
        config = shrink(original.config, level)
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in type(original)(config).parameters())
        except Exception as error:  # sizes that the rules get wrong
            failures.append(_line(error))
            continue
        if size > 4 * MOST_PARAMETERS:
            failures.append(f"it still has {size / 1e6:.0f} M parameters")
            continue
        for wanted in _DTYPES if dtype is None else (dtype,):
            try:
                model, batch = _instance(original, config, wanted)
            except Exception as error:  # as above, or an operator without this dtype
                failures.append(_line(error))
                continue
            notes = [f"{size / 1e6:.2g} M parameters", str(wanted).removeprefix("torch."), "dropout off"]
            if level is not LEVELS[0]:
                notes.append(f"only {', '.join(sorted(level))} made smaller ({failures[0]})")
            return TinyModel(model, batch, tuple(notes), _even(model, wanted))
    raise CaptureError(f"no tiny copy of {type(original).__name__} runs: {failures[0]}")


def _instance(original: PreTrainedModel, config: Any, dtype: torch.dtype) -> tuple[nn.Module, Callable[[int], Batch]]:
    torch.manual_seed(0)
    model = type(original)(config).to(dtype)
    if dtype is torch.float64:
        model.set_experts_implementation("eager")  # the grouped product takes no float64
    _randomized(model)
    fill_placeholders(model)
    batch = _batches(model, dtype)
    _check_runs(model, batch(0))
    return model, batch


def _randomized(model: nn.Module) -> nn.Module:
    """With noise on every parameter, so that no bias is zero and no norm's weight is one, and nothing is not finite."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.02
            sane = torch.isfinite(parameter) & (parameter.abs() < 100)
            parameter.copy_(torch.where(sane, parameter, torch.zeros_like(parameter)) + noise)
    return model.train()


def _check_runs(model: nn.Module, batch: Batch) -> None:
    with torch.no_grad():
        loss = find_outputs(model(**batch)).get("loss")
    if loss is None or not bool(torch.isfinite(loss)):
        raise CaptureError("the tiny copy gives no finite loss")


def _even(model: nn.Module, dtype: torch.dtype) -> Callable[[int], Batch]:
    """Batches with images of one shape, made up when they are asked for."""
    return lambda rank: _batches(model, dtype, even=True)(rank)


def _batches(model: nn.Module, dtype: torch.dtype, even: bool = False) -> Callable[[int], Batch]:
    """Batches by data rank, with two images and two clips where the model takes them. even: images of one shape."""
    limits = input_constraints(model)
    images, audio = limits.images, limits.audio
    grid = images.nearest_grid(1, 1) if images is not None else None
    if images is not None and grid is not None and images.grid is None:
        grid = (grid[0] * 2, grid[1] * 4)
    longest = limits.max_seq_len or _PROBE_LENGTH
    special = special_ids(model.config) if is_hugging_face(model) else set()

    def inputs(seq_len: int, turned: bool) -> Any:
        shape = (
            (grid[1], grid[0]) if turned and grid is not None and images is not None and images.grid is None else grid
        )
        frames = audio.nearest_frames(1.0) if audio is not None else None
        request = InputRequest(seq_len, 2 if images else 0, shape, frames, 2 if audio else 0)
        return make_inputs(model, request, check=False)

    seen = inputs(min(longest, _PROBE_LENGTH), False)
    needed = seen.images * (seen.tokens_per_image + 2) + seen.clips * (seen.tokens_per_clip + 2) + _TEXT
    length = min(longest, -(-needed // _MULTIPLE) * _MULTIPLE)

    def batch(rank: int) -> Batch:
        turned = rank % 2 == 1 and images is not None and images.packed and not even
        return _varied(_real(inputs(length, turned).kwargs, dtype, rank), rank, special)

    return batch


def _real(kwargs: Batch, dtype: torch.dtype, rank: int) -> Batch:
    """Random numbers for what a batch states by its shape only or as float tensors, other ones on every rank."""
    generator = torch.Generator().manual_seed(1000 + rank)

    def filled(value: Any) -> Any:
        if isinstance(value, FloatSpec) or (isinstance(value, Tensor) and value.is_floating_point()):
            return torch.randn(value.shape, generator=generator).to(dtype)
        return value

    return {name: filled(value) for name, value in kwargs.items()}


def _varied(batch: Batch, rank: int, special: Collection[int] = ()) -> Batch:
    """Other text tokens on every rank, and other numbers of targets. Special tokens stay, and those without a target:
    they may be placeholders of images."""
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        return batch
    result = dict(batch)
    if isinstance(ids, Tensor) and ids.shape == labels.shape:
        text = (labels == ids) & (labels >= 0) & ~torch.isin(ids, torch.tensor(sorted(special), dtype=ids.dtype))
        words = ids[text]
        order = torch.randperm(len(words), generator=torch.Generator().manual_seed(rank))
        result["input_ids"] = ids.masked_scatter(text, words[order])
        result["labels"] = labels = labels.masked_scatter(text, words[order])
    ignored = torch.zeros_like(labels, dtype=torch.bool)
    ignored[:, : 2 + rank % 5] = True
    result["labels"] = labels.masked_fill(ignored, -100)
    return result
