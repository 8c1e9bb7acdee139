"""Capture a model's forward with loss for lowering: one static graph for every batch of a budget.

The batch's float tensors and every tensor that the model's host code makes of its integer tensors are inputs of the
graph (see `crossing`); no metadata of the example batch is burnt in.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from omnicompile.anchors.huggingface import anchored
from omnicompile.anchors.masks import positions_restart
from omnicompile.capture.host_mode import MAX_HOST_ELEMENTS
from omnicompile.capture.trace import explain_failure
from omnicompile.errors import CaptureError, InputError
from omnicompile.lowering.cleanup import clean
from omnicompile.lowering.crossing import Crossing, CrossingMode
from omnicompile.lowering.host_program import HostProgram, fake_copy, fit, is_host_input
from omnicompile.torch_compat import as_in_eager, new_fake_mode

DEFAULT_SEGMENTS = 64
LOSS_PART = "losses."  # before the name of a summand of the loss among the outputs


@dataclass
class CapturedForward:
    """The forward as a flat functional graph of pre-dispatch ATen operators.

    gm: placeholders are parameters, buffers, constants, float inputs and host inputs; the output is a tuple with one
    value for each of `outputs` ("loss", "logits"). params / buffers / inputs: placeholder name -> name in the model or
    the batch. constants: placeholder name -> tensor that the model makes of literals. host: placeholders of host
    metadata, in crossing order -> names of the batch's tensors that they are known to come from. numbers: of single
    numbers among them, "total" or "number" (see `Crossing`).
    """

    gm: fx.GraphModule
    params: dict[str, str]
    buffers: dict[str, str]
    constants: dict[str, Tensor]
    inputs: dict[str, str]
    host: dict[str, frozenset[str]]
    outputs: tuple[str, ...]
    numbers: Mapping[str, str] = field(default_factory=dict)


class LoweredInputs:
    """Turns a batch into the tensors that a captured graph takes."""

    def __init__(self, captured: CapturedForward, program: HostProgram, shapes: tuple[Tensor, ...]) -> None:
        self._captured = captured
        self._program = program
        self._shapes = shapes

    def prepare(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """placeholder name -> CPU tensor of the captured shape. Runs the model's host code; needs no process group.
        Raises LoweringError or InputError when the batch does not fit the captured budget."""
        self._check_shapes(batch)
        recording = self._program.replay(batch)
        values = {placeholder: batch[name] for placeholder, name in self._captured.inputs.items()}
        for number, (name, crossing) in enumerate(zip(self._captured.host, recording.crossings)):
            values[name] = fit(crossing, self._shapes[number], number)
        return values

    def _check_shapes(self, batch: Mapping[str, Any]) -> None:
        for placeholder, name in self._captured.inputs.items():
            (node,) = (n for n in self._captured.gm.graph.find_nodes(op="placeholder") if n.name == placeholder)
            want, got = tuple(node.meta["val"].shape), batch.get(name)
            if not isinstance(got, Tensor) or tuple(got.shape) != want:
                have = "is missing" if not isinstance(got, Tensor) else f"has shape {list(got.shape)}"
                raise InputError(f"`{name}` {have}, the graph takes {list(want)}: pad the batch to the budget")


class _Forward(nn.Module):
    """`forward(inputs, host)`: the model on traced inputs, host tensors coming from `host` where they cross."""

    def __init__(
        self, model: nn.Module, fixed: Mapping[str, Any], values: Mapping[str, Tensor], mode: CrossingMode
    ) -> None:
        super().__init__()
        self.model = model
        self._fixed = dict(fixed)
        self._values = dict(values)
        self._mode = mode

    def forward(self, inputs: dict[str, Tensor], host: list[Tensor]) -> tuple[Tensor, ...]:
        self._mode.inputs = host
        for name, value in inputs.items():
            if name in self._values:
                self._mode.know(value, self._values[name])
        with as_in_eager():
            return tuple(find_outputs(self.model(**inputs, **self._fixed)).values())


def find_outputs(output: Any) -> dict[str, Tensor]:
    """loss and logits in a model's output: `.loss` / `.logits`, mapping entries, or a bare scalar loss. The summands
    that a model reports as a mapping `losses` are `losses.NAME`."""
    if isinstance(output, Tensor):
        return {"loss": output} if output.numel() == 1 else {"logits": output}
    if isinstance(output, Mapping):
        found = {name: output.get(name) for name in ("loss", "logits")}
    elif isinstance(output, tuple) and not hasattr(output, "_fields"):
        found = find_outputs(output[0])  # type: ignore[assignment]
    else:
        found = {name: getattr(output, name, None) for name in ("loss", "logits")}
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    parts = output.get("losses") if isinstance(output, Mapping) else None
    if isinstance(parts, Mapping):
        tensors |= {LOSS_PART + name: value for name, value in parts.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CaptureError("the model's forward returns neither a loss nor logits: return one of them")
    if "loss" in tensors and tensors["loss"].numel() != 1:
        raise CaptureError(
            f"the model's loss has shape {tuple(tensors['loss'].shape)}, but a scalar is needed: reduce it"
        )
    return tensors


def capture_forward(
    model: nn.Module,
    batch: Mapping[str, Any],
    segments: int = DEFAULT_SEGMENTS,
    dtype: torch.dtype | None = None,
) -> tuple[CapturedForward, LoweredInputs]:
    """Capture `model(**batch)` for batches of the shapes of `batch`.

    model: real or on the meta device; it is not changed. batch: an example with real integer tensors. segments: how
    many segments (images, windows, ...) an attention over packed segments holds at most; at least the example's.
    dtype: compute dtype of the parameters (None: the model's own). Raises CaptureError naming the cause.
    """
    mode = new_fake_mode()
    copied = fake_copy(model, mode, dtype)
    program = HostProgram(copied, mode, positions_restart(batch.get("position_ids")))
    try:
        first = program.learn(batch)
        host = [_with_room(c.value, segments) if c.bounds_only else c.value for c in first.crossings]
        traced = {k: program.argument(k, v) for k, v in batch.items() if isinstance(v, Tensor) and not is_host_input(v)}
        fixed = {k: program.argument(k, v) for k, v in batch.items() if k not in traced}
        crossing = CrossingMode()
        crossing.name_sources(fixed)
        values = {name: batch[name] for name in traced if batch[name].device.type == "cpu"}
        wrapped = _Forward(copied, fixed, values, crossing)
        fakes = [mode.from_tensor(value) for value in host]
        with anchored(copied, packed=program.packed), crossing, warnings.catch_warnings():
            # Tensors that the host code keeps on the model (a cache of position offsets, say) stay on the copy.
            warnings.filterwarnings("ignore", message="The tensor attribute")
            exported = torch.export.export(wrapped, (traced, fakes), strict=False)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(explain_failure(error, model)) from error
    if len(crossing.crossings) != len(host):
        raise CaptureError(
            f"{type(model).__name__}: tracing met {len(crossing.crossings)} metadata tensors, a run before it "
            f"{len(host)}: the forward must do the same each time it is called"
        )
    captured = _captured(exported, tuple(find_outputs(first.output)), first.crossings)
    _merge_tied(captured, copied)
    return captured, LoweredInputs(captured, program, tuple(host))


def _merge_tied(captured: CapturedForward, model: nn.Module) -> None:
    """Give a parameter that goes by several names one placeholder, under the name that `named_parameters` gives it."""
    first = {id(tensor): name for name, tensor in model.named_parameters()}
    every = {name: first[id(tensor)] for name, tensor in model.named_parameters(remove_duplicate=False)}
    graph, kept = captured.gm.graph, dict[str, fx.Node]()
    for node in list(graph.find_nodes(op="placeholder")):
        if node.name not in captured.params:
            continue
        name = captured.params[node.name] = every[captured.params[node.name]]
        if name in kept:
            node.replace_all_uses_with(kept[name])
            graph.erase_node(node)
            del captured.params[node.name]
        else:
            kept[name] = node
    captured.gm.recompile()


def _with_room(bounds: Tensor, segments: int) -> Tensor:
    short = segments + 1 - bounds.shape[0]
    return torch.cat([bounds, bounds[-1:].expand(short)]) if short > 0 else bounds


def _captured(
    exported: torch.export.ExportedProgram, outputs: tuple[str, ...], crossings: Sequence[Crossing]
) -> CapturedForward:
    signature, gm = exported.graph_signature, exported.graph_module

    def strip(name: str) -> str:
        return name.removeprefix("model.")

    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        names = ", ".join(strip(n) for n in signature.buffers_to_mutate.values())
        raise CaptureError(f"the forward changes buffers or inputs in place ({names}): that cannot be parallelized")
    params = {p: strip(n) for p, n in signature.inputs_to_parameters.items()}
    buffers = {p: strip(n) for p, n in signature.inputs_to_buffers.items()}
    constants = {p: exported.constants[n] for p, n in signature.inputs_to_lifted_tensor_constants.items()}
    for value in constants.values():
        if value.numel() > MAX_HOST_ELEMENTS:  # not taken for metadata, so whose values it holds is not known
            raise CaptureError(
                f"the forward makes a tensor of shape {list(value.shape)} outside the traced graph, too large for an "
                f"input (more than {MAX_HOST_ELEMENTS:,} elements): give it as an input, or train shorter sequences"
            )
    known = {*params, *buffers, *constants}
    rest = [n for n in gm.graph.find_nodes(op="placeholder") if n.name not in known]
    met = {n.name: crossings[int(n.name.removeprefix("host_"))] for n in rest if n.name.startswith("host_")}
    host = {name: crossing.sources for name, crossing in met.items()}
    numbers = {name: crossing.number for name, crossing in met.items() if crossing.number}
    inputs = {n.name: n.name.removeprefix("inputs_") for n in rest if n.name not in host}
    clean(gm)
    return CapturedForward(gm, params, buffers, constants, inputs, host, outputs, numbers)
