"""Trace a whole forward with loss into one pre-dispatch ATen graph, without weights."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from omnicompile.anchors.huggingface import anchored
from omnicompile.capture.host_mode import HostMode, is_host
from omnicompile.capture.repeats import Repeats, record_repeats
from omnicompile.errors import CaptureError
from omnicompile.torch_compat import FakeTensor, FakeTensorMode, new_fake_mode


@dataclass
class TracedForward:
    """A forward as torch.export gives it: parameters, buffers and inputs are placeholders of `graph`.

    params / buffers: placeholder name -> name in the model. inputs: placeholder name -> name in the batch. constants:
    placeholder name -> the real tensor that the trace burnt in. repeats: the layers that were traced once.
    """

    graph: fx.GraphModule
    params: dict[str, str]
    buffers: dict[str, str]
    inputs: dict[str, str]
    constants: dict[str, Tensor] = field(default_factory=dict)
    repeats: Repeats = field(default_factory=Repeats)


class LossForward(nn.Module):
    """`forward(inputs)` returns the model's loss; `fixed` are keyword arguments that are not traced (host metadata)."""

    def __init__(self, model: nn.Module, fixed: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.fixed = dict(fixed)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return find_loss(self.model(**inputs, **self.fixed))


def find_loss(output: Any) -> Tensor:
    """The scalar loss in a model's output: the output itself, `.loss`, ["loss"], or the first of a tuple."""
    if isinstance(output, Tensor):
        loss = output
    elif isinstance(output, Mapping):
        loss = output.get("loss")
    elif isinstance(output, tuple | list) and output:
        loss = output[0]
    else:
        loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise CaptureError(
            "the model's forward returns no loss: give it labels, or wrap it so that it returns a scalar loss"
        )
    if loss.numel() != 1:
        raise CaptureError(f"the model's loss has shape {tuple(loss.shape)}, but a scalar is needed: reduce it")
    return loss


@contextlib.contextmanager
def fake_parameters(model: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """While active, the model's parameters and meta buffers are fake CPU tensors; shared ones stay shared."""
    fakes: dict[int, Tensor] = {}
    saved: list[tuple[dict[str, Any], str, Any]] = []

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in fakes:
            with mode:
                value = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                value = nn.Parameter(value, requires_grad=tensor.requires_grad)
            fakes[id(tensor)] = value
        return fakes[id(tensor)]

    try:
        for module in model.modules():
            for store in (module._parameters, module._buffers):
                for name, tensor in store.items():
                    if tensor is None or (store is module._buffers and tensor.device.type != "meta"):
                        continue
                    saved.append((store, name, tensor))
                    store[name] = fake(tensor)
        yield
    finally:
        for store, name, tensor in saved:
            store[name] = tensor


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """transformers' data-dependent checks become asserts that break a joint trace; it reads this switch when it runs."""
    name = "TRANSFORMERS_DISABLE_TORCH_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _as_traced(value: Any, mode: FakeTensorMode) -> Tensor:
    if isinstance(value, FakeTensor):
        return value
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    shape, dtype = value.shape, value.dtype
    with mode:
        return torch.empty(shape, dtype=dtype, device="cpu")


def trace_forward(
    model: nn.Module, kwargs: Mapping[str, Any], host: frozenset[str] | set[str] = frozenset(), repeat: bool = True
) -> TracedForward:
    """Trace `model(**kwargs)`'s loss.

    kwargs: tensors (real or fake), objects with `shape` and `dtype` for float inputs of which only the shape matters, and
    plain values. host: names of the metadata to evaluate for real (it must be real integer tensors). repeat: trace each
    kind of repeated layer once. Raises CaptureError naming the cause and the user's line.
    """
    mode = new_fake_mode()
    traced: dict[str, Tensor] = {}
    fixed: dict[str, Any] = {}
    for name, value in kwargs.items():
        if name in host or not (isinstance(value, Tensor) or hasattr(value, "shape")):
            fixed[name] = value
        else:
            traced[name] = _as_traced(value, mode)
    if "use_cache" in inspect.signature(model.forward).parameters:
        fixed.setdefault("use_cache", False)
    wrapped = LossForward(model, fixed)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_environment())
        stack.enter_context(fake_parameters(model, mode))
        stack.enter_context(anchored(model))
        repeats = stack.enter_context(record_repeats(model)) if repeat else Repeats()
        try:
            with HostMode():
                program = torch.export.export(wrapped, (traced,), strict=False)
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(explain_failure(error, model)) from error
    return _from_exported(program, repeats)


def _from_exported(program: torch.export.ExportedProgram, repeats: Repeats) -> TracedForward:
    signature = program.graph_signature

    def strip(name: str) -> str:
        return name.removeprefix("model.")

    constants: dict[str, Tensor] = {}
    lifted = signature.inputs_to_lifted_tensor_constants
    for placeholder, name in lifted.items():
        value = program.constants[name]
        if is_host(value) or isinstance(value, Tensor):
            constants[placeholder] = value
    inputs = {}
    for node in program.graph_module.graph.find_nodes(op="placeholder"):
        if node.name in signature.user_inputs:
            inputs[node.name] = node.name.removeprefix("inputs_")
    return TracedForward(
        graph=program.graph_module,
        params={p: strip(n) for p, n in signature.inputs_to_parameters.items()},
        buffers={p: strip(n) for p, n in signature.inputs_to_buffers.items()},
        inputs=inputs,
        constants=constants,
        repeats=repeats,
    )


def explain_failure(error: Exception, model: nn.Module) -> str:
    """One line: what went wrong, and the deepest line of code outside torch that it happened in."""
    place = ""
    frame = error.__traceback__
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename
        if f"{os.sep}torch{os.sep}" not in file and f"{os.sep}omnicompile{os.sep}" not in file and "<" not in file:
            place = f"{file}:{frame.tb_lineno}"
        frame = frame.tb_next
    first = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {first[0] if first else ''}"
    hint = ""
    if "data-dependent" in what.lower() or "DataDependent" in type(error).__name__ or "Unbacked" in str(error):
        hint = " (control flow depends on tensor values: make it static, or give the values as host metadata)"
    return f"{type(model).__name__} could not be traced: {what}{hint}" + (f" at {place}" if place else "")
