"""The forward of a user's model at full size, without weights: what a dry run and `omnicompile show` look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omnicompile.capture.inputs import FloatSpec, InputConstraints, InputRequest, Rows, input_constraints, make_inputs
from omnicompile.capture.sample import sample_shape
from omnicompile.capture.source import ModelSource
from omnicompile.errors import LoweringError
from omnicompile.lowering.driver import rank_program, with_outputs
from omnicompile.lowering.graph_capture import capture_forward
from omnicompile.lowering.host_program import is_host_input
from omnicompile.lowering.tiny import Batch, is_hugging_face
from omnicompile.passes.rank_program import RankProgram
from omnicompile.plan import Plan
from omnicompile.workload import Workload


def full_batch(source: ModelSource, model: nn.Module, workload: Workload, micro_batch: int = 1) -> Batch:
    """A micro-batch of `workload`: real integer tensors, float tensors on the meta device."""
    if source.inputs is not None or not is_hugging_face(model):
        if source.inputs is None:
            raise LoweringError(f"{source.spec}: add inputs() to say what the forward takes")
        return {name: _meta(value) for name, value in source.inputs(workload).items()}
    limits = input_constraints(model)
    probe = make_inputs(model, _request(limits, workload, 1), check=False)
    sample = sample_shape(limits, probe, workload)
    request = InputRequest(
        seq_len=sample.seq_len,
        images=sample.images * micro_batch,
        image_grid=limits.images.nearest_grid(*workload.image_size) if limits.images else None,
        audio_frames=sample.frames_per_clip or None,
        clips=sample.clips * micro_batch,
        batch=micro_batch,
    )
    kwargs = make_inputs(model, request, check=False).kwargs
    return {name: _meta(value) for name, value in kwargs.items()}


def _request(limits: InputConstraints, workload: Workload, micro_batch: int) -> InputRequest:
    seq_len = min(workload.seq_len, limits.max_seq_len or workload.seq_len)
    seconds = 30.0 if workload.audio_seconds is None else workload.audio_seconds
    images = 1 if limits.rows is Rows.IMAGES or workload.images is None else workload.images
    return InputRequest(
        seq_len=seq_len,
        images=images if limits.images else 0,
        image_grid=limits.images.nearest_grid(*workload.image_size) if limits.images else None,
        clips=1 if limits.audio and seconds else 0,
        audio_frames=limits.audio.nearest_frames(seconds) if limits.audio else None,
        batch=micro_batch,
    )


def _meta(value: Any) -> Any:
    if isinstance(value, FloatSpec) or (isinstance(value, Tensor) and value.is_floating_point()):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return value


@dataclass(frozen=True)
class FullProgram:
    """before: what the passes start from. host: the batch's metadata by placeholder, real integer tensors."""

    before: RankProgram
    host: dict[str, Tensor]


def full_program(model: nn.Module, batch: Batch, plan: Plan, stored: torch.dtype = torch.float32) -> FullProgram:
    """The forward at the size of `batch`. stored: dtype of the master weights."""
    forward, inputs = capture_forward(model, batch)
    if "loss" not in forward.outputs:
        raise LoweringError("the model returned no loss: give it `labels`, or wrap it to return a scalar loss")
    grads = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    before = rank_program(with_outputs(forward, ("loss",)), plan, grads, token_lengths(batch), stored)
    host = {name: value for name, value in inputs.prepare(batch).items() if name in forward.host}
    return FullProgram(before, host)


def token_lengths(batch: Batch) -> set[int]:
    """Sizes that count tokens or patches."""
    found = set()
    for value in batch.values():
        if isinstance(value, Tensor) and value.dim() == 2:
            found.add(value.shape[1] if is_host_input(value) else value.shape[0])
    return {size for size in found if size > 3}
