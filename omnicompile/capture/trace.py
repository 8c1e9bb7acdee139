"""Trace a whole forward with loss into one pre-dispatch ATen graph, without weights."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from omnicompile.anchors.huggingface import anchored
from omnicompile.capture.host_mode import HostMode
from omnicompile.capture.repeats import Repeats, record_repeats
from omnicompile.errors import CaptureError
from omnicompile.torch_compat import FakeTensor, FakeTensorMode, new_fake_mode, trace_pre_dispatch, traced_nodes


@dataclass
class TracedForward:
    """A flat functional graph: parameters, buffers, inputs and constants are placeholders; `meta["module_path"]` of a
    node is the module that it was traced in.

    params / buffers: placeholder name -> name in the model. inputs: placeholder name -> name in the batch. constants:
    placeholder name -> the real tensor that the trace burnt in; host_inputs: those of them that are a host argument
    itself -> its name. repeats: the layers that were traced once.
    """

    graph: fx.GraphModule
    params: dict[str, str]
    buffers: dict[str, str]
    inputs: dict[str, str]
    constants: dict[str, Tensor] = field(default_factory=dict)
    repeats: Repeats = field(default_factory=Repeats)
    host_inputs: dict[str, str] = field(default_factory=dict)


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
def fake_parameters(model: nn.Module, mode: FakeTensorMode, distinct: bool = True) -> Iterator[None]:
    """While active, the model's parameters and meta buffers are fake CPU tensors; shared ones stay shared.

    distinct: False when only shapes matter; then all parameters of one shape are one tensor, which is faster to make.
    """
    fakes: dict[object, Tensor] = {}
    saved: list[tuple[dict[str, Any], str, Any]] = []

    def fake(tensor: Tensor) -> Tensor:
        trained = isinstance(tensor, nn.Parameter) and tensor.requires_grad
        key = id(tensor) if distinct else (tensor.shape, tensor.dtype, type(tensor), trained)
        if key not in fakes:
            with mode:
                value = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                value = nn.Parameter(value, requires_grad=trained)
            fakes[key] = value
        return fakes[key]

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
def value_checks_off() -> Iterator[None]:
    """transformers' data-dependent checks become asserts that break a joint trace; it reads this switch as it runs."""
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

    kwargs: tensors (real or fake), objects with `shape` and `dtype` for float inputs of which only the shape matters,
    and plain values. host: names of the metadata to evaluate for real (it must be real integer tensors). repeat: trace
    each kind of repeated layer once. Raises CaptureError naming the cause and the user's line.
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
    with contextlib.ExitStack() as stack:
        stack.enter_context(value_checks_off())
        stack.enter_context(fake_parameters(model, mode))
        stack.enter_context(anchored(model, planning=True))
        repeats = stack.enter_context(record_repeats(model)) if repeat else Repeats()
        paths = stack.enter_context(record_paths(model))
        try:
            return _trace(model, traced, fixed, repeats, paths, mode)
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(explain_failure(error, model)) from error


@dataclass(frozen=True)
class _Slot:
    """Where a module keeps a parameter or buffer: `store[key]`. Shared tensors have one `index`."""

    store: dict[str, Any]
    key: str
    index: int


def _state(model: nn.Module, alike: frozenset[str]) -> tuple[list[Tensor], list[str], list[_Slot]]:
    """Every buffer and parameter once but for those of modules `alike`, their names, and the places that hold them.

    A model has most of its parameters in layers that are like others and are not traced, and each argument of a trace
    takes time. If such a layer is traced after all, its parameters enter as attributes (`_lift_parameters`).
    """
    tensors: list[Tensor] = []
    names: list[str] = []
    slots: list[_Slot] = []
    index: dict[int, int] = {}
    for path, module in model.named_modules():
        later = _is_inside(path, alike)
        for store in (module._buffers,) if later else (module._parameters, module._buffers):
            for key, tensor in store.items():
                if tensor is None:
                    continue
                if id(tensor) not in index:
                    index[id(tensor)] = len(tensors)
                    tensors.append(tensor)
                    names.append(f"{path}.{key}" if path else key)
                slots.append(_Slot(store, key, index[id(tensor)]))
    return tensors, names, slots


def _is_inside(path: str, outer: frozenset[str]) -> bool:
    parts = path.split(".")
    return any(".".join(parts[:n]) in outer for n in range(1, len(parts) + 1))


def _trace(
    model: nn.Module,
    traced: dict[str, Tensor],
    fixed: dict[str, Any],
    repeats: Repeats,
    paths: list[ModuleSpan],
    mode: FakeTensorMode,
) -> TracedForward:
    tensors, names, slots = _state(model, repeats.alike)
    originals = [slot.store[slot.key] for slot in slots]

    host_mode = HostMode()

    def forward(*flat: Tensor) -> Tensor:
        # Inside, tensors are wrapped for functionalization: the module must see the wrapped ones.
        try:
            for slot in slots:
                slot.store[slot.key] = flat[slot.index]
            given = dict(zip(traced, flat[len(tensors) :]))
            host_mode.add_without_padding(t for t in given.values() if t.is_floating_point())
            return find_loss(model(**given, **fixed))
        finally:
            for slot, original in zip(slots, originals):
                slot.store[slot.key] = original

    with host_mode, mode:
        module = trace_pre_dispatch(forward, [*tensors, *traced.values()])
    _name_modules(module.graph, paths)
    placeholders = [n.name for n in module.graph.find_nodes(op="placeholder")]
    params = {p: n for p, n, t in zip(placeholders, names, tensors) if isinstance(t, nn.Parameter)}
    buffers = {p: n for p, n in zip(placeholders, names) if p not in params}
    params |= _lift_parameters(module, model)
    constants = _lift_constants(module)
    return TracedForward(
        graph=module,
        params=params,
        buffers=buffers,
        inputs=dict(zip(placeholders[len(tensors) :], traced)),
        constants=constants,
        repeats=repeats,
        host_inputs=_host_inputs(constants, fixed),
    )


def _host_inputs(constants: Mapping[str, Tensor], fixed: Mapping[str, Any]) -> dict[str, str]:
    """Constants that are an argument, or a view of one: constant -> argument."""
    arguments = {value.data_ptr(): name for name, value in fixed.items() if isinstance(value, Tensor)}
    found = {name: arguments.get(tensor.data_ptr()) for name, tensor in constants.items() if type(tensor) is Tensor}
    return {name: argument for name, argument in found.items() if argument is not None}


@dataclass(frozen=True)
class ModuleSpan:
    """The nodes that were traced while a module's forward ran: numbers `start` to `end` of the graph."""

    path: str
    start: int
    end: int


@contextlib.contextmanager
def record_paths(model: nn.Module) -> Iterator[list[ModuleSpan]]:
    """While active, every module's forward notes which nodes it makes; inner modules come before outer ones."""
    spans: list[ModuleSpan] = []
    open_calls: list[tuple[str, int]] = []

    def enter(path: str) -> Any:
        return lambda _module, _args: open_calls.append((path, traced_nodes()))

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        path, start = open_calls.pop()
        spans.append(ModuleSpan(path, start, traced_nodes()))

    handles = []
    try:
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(enter(path)))
            handles.append(module.register_forward_hook(leave))
        yield spans
    finally:
        for handle in handles:
            handle.remove()


def _name_modules(graph: fx.Graph, spans: list[ModuleSpan]) -> None:
    """Write each node's module into `meta["module_path"]`: that of the innermost forward it was traced in."""
    nodes = list(graph.nodes)
    for span in spans:
        for node in nodes[span.start : span.end]:
            node.meta.setdefault("module_path", span.path)


def _lift_parameters(module: fx.GraphModule, model: nn.Module) -> dict[str, str]:
    """Parameters that the trace met without having them as arguments become placeholders: placeholder -> parameter."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {node: names[id(value)] for node, value in _lift(module, "param", lambda value: id(value) in names).items()}


def _lift_constants(module: fx.GraphModule) -> dict[str, Tensor]:
    """Real tensors that the trace burnt in become placeholders: name -> tensor."""
    return _lift(module, "constant", lambda value: True)


def _lift(module: fx.GraphModule, prefix: str, wanted: Callable[[Tensor], bool]) -> dict[str, Tensor]:
    graph, found = module.graph, {}
    lifted: dict[int, fx.Node] = {}
    first = next(iter(graph.nodes))
    for node in list(graph.nodes):
        value = getattr(module, str(node.target)) if node.op == "get_attr" else None
        if not isinstance(value, Tensor) or not wanted(value):
            continue
        if id(value) not in lifted:
            with graph.inserting_before(first):
                new = graph.placeholder(f"{prefix}{len(lifted)}")
            new.meta["val"] = value
            lifted[id(value)] = new
            found[new.name] = value
        node.replace_all_uses_with(lifted[id(value)])
        graph.erase_node(node)
    return found


def explain_failure(error: Exception, model: nn.Module) -> str:
    """One line: what went wrong, and the deepest line of code outside torch that it happened in."""
    place = ""
    frame = error.__traceback__
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename
        if f"{os.sep}torch{os.sep}" not in file and f"{os.sep}omnicompile{os.sep}" not in file and "<" not in file:
            place = f"{file}:{frame.tb_lineno}"
        frame = frame.tb_next
    name, where = type(model).__name__, f" at {place}" if place else ""
    if "DataDependent" in type(error).__name__ or "data-dependent" in str(error).lower() or "Unbacked" in str(error):
        return (
            f"{name} could not be traced: control flow depends on the values of a tensor{where}: "
            "use torch.where or masks there, or give the values as host metadata (an integer input)"
        )
    first = str(error).strip().splitlines()
    return f"{name} could not be traced: {type(error).__name__}: {first[0] if first else ''}{where}"
