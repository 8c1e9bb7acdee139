"""The model's own host-side code, run again for each batch to compute the metadata that the graph takes as inputs.

The code runs on a copy of the model whose parameters are fake tensors, so it costs Python time and nothing else.
Submodules in which no host operation ran and nothing crossed for the first time are not entered again: their recorded
outputs stand in for them, so that the cost does not grow with depth, and is that of the host's work.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from omnicompile.anchors.huggingface import anchored
from omnicompile.capture.host_mode import is_host
from omnicompile.errors import InputError, LoweringError, OmniCompileError
from omnicompile.lowering.crossing import Call, Crossing, CrossingMode, Result
from omnicompile.torch_compat import FakeTensor, FakeTensorMode, new_fake_mode, unseen


def is_host_input(value: object) -> bool:
    """Integer tensors of a batch are metadata, computed with on the host; float tensors are data."""
    return isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex()


def fake_copy(model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of `model` with fake CPU parameters and buffers; floating ones in `dtype`. Shared tensors stay shared."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) in memo:
            continue
        cast = dtype if dtype is not None and isinstance(tensor, nn.Parameter) and tensor.is_floating_point() else None
        with mode:
            fake = torch.empty(tensor.shape, dtype=cast or tensor.dtype, device="cpu")
        memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
    copied = copy.deepcopy(model, memo)
    _disable_caches(copied)
    return copied


def _disable_caches(model: nn.Module) -> None:
    """Key-value caches are for generation; a model that may make one does so by its configuration's `use_cache`."""
    for module in model.modules():
        config = module.__dict__.get("config")
        if config is not None and getattr(config, "use_cache", False):
            config.use_cache = False


@dataclass
class Recording:
    """One run: what crossed, which operations were traced and gave what, and what the model returned."""

    crossings: list[Crossing] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    results: dict[int, Result] = field(default_factory=dict)
    output: Any = None


@dataclass
class _ModuleRun:
    """A call of a submodule. given: its arguments without contents of tensors. quiet: neither host work nor a first
    crossing happened in it, and all that it gives is without values. inner: calls that it made of others."""

    path: str
    given: tuple[Any, ...] = ()
    output: Any = None
    quiet: bool = False
    inner: list[_ModuleRun] = field(default_factory=list)


class _OtherCall(Exception):
    """A submodule that is not entered was called with other shapes or numbers than in the first run."""


class HostProgram:
    """Runs the host-side code of `model` (a fake copy, as `fake_copy` makes it) under the fake mode `mode`.

    packed: rows may have several samples.
    """

    def __init__(self, model: nn.Module, mode: FakeTensorMode | None = None, packed: bool = False) -> None:
        self.mode = mode or new_fake_mode()
        self.model = model
        self.packed = packed
        self._first: Recording | None = None  # what later runs are compared with
        self._whole = Recording()  # the same with every submodule entered
        self._skipped_calls: list[Call] = []
        self._quiet: dict[str, list[_ModuleRun]] = {}  # of submodules that are not entered, by path

    def learn(self, batch: Mapping[str, Any]) -> Recording:
        """The first run: every submodule is entered, and quiet ones are found."""
        mode = _CountingMode()
        with watch_modules(self.model, mode) as runs:
            recording = self._run(batch, mode)
        self._quiet, self._whole = _outermost(runs), recording
        self._first = self._short_run(batch, recording)
        return recording

    def _short_run(self, batch: Mapping[str, Any], recording: Recording) -> Recording:
        """A run that skips quiet submodules; all are entered from now on where skipping changes what happens."""
        try:
            with self._stubs():
                short = self._run(batch, CrossingMode())
        except Exception:  # the model looks into its layers, for router logits or hidden states, say
            short = Recording()
        if _same_values(short.crossings, recording.crossings):
            return short
        self._quiet = {}
        return recording

    def replay(self, batch: Mapping[str, Any]) -> Recording:
        """The crossings of another batch. Raises LoweringError if that batch would give another graph."""
        if self._first is None:
            raise RuntimeError("replay before learn")
        first = self._first
        try:
            try:
                with self._stubs():
                    recording = self._run(batch, CrossingMode(known=first.results))
            except _OtherCall:
                first = self._whole
                recording = self._run(batch, CrossingMode(known=first.results))
        except OmniCompileError:
            raise
        except Exception as error:  # of the model's own code, among layers that have the captured shapes
            cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise LoweringError(
                f"this batch does not fit the captured graph ({cause}). Pad batches to one budget"
            ) from error
        _check_same(first, recording)
        for ours, theirs in zip(self._whole.crossings, recording.crossings):
            theirs.bounds_only &= ours.bounds_only  # other uses may be in submodules that were not entered
        return recording

    def _run(self, batch: Mapping[str, Any], mode: CrossingMode) -> Recording:
        kwargs = {name: self.argument(name, value) for name, value in batch.items()}
        mode.name_sources(kwargs)
        for name, value in batch.items():
            if isinstance(value, Tensor) and value.device.type == "cpu" and not is_host_input(value):
                mode.know(kwargs[name], value)
        with torch.no_grad(), self.mode, anchored(self.model, packed=self.packed), mode:
            output = self.model(**kwargs)
        return Recording(mode.crossings, mode.calls, mode.results, output)

    def argument(self, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if is_host_input(value):
            return value.detach().cpu()
        with self.mode:
            return torch.empty(value.shape, dtype=value.dtype, device="cpu")

    @contextlib.contextmanager
    def _stubs(self) -> Iterator[None]:
        """While active, quiet submodules return what they returned in the first run."""
        modules = [(self.model.get_submodule(path), iter(runs)) for path, runs in self._quiet.items()]
        try:
            for module, runs in modules:
                module.forward = _stub(runs)  # type: ignore[method-assign]
            yield
        finally:
            for module, _ in modules:
                del module.forward


def _stub(runs: Iterator[_ModuleRun]) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        run = next(runs, None)
        if run is None or _given(args, kwargs) != run.given:
            raise _OtherCall
        return run.output

    return forward


def _given(args: Any, kwargs: Any) -> tuple[Any, ...]:
    """Arguments, shapes in place of traced tensors; of host tensors nothing, as they are checked where they cross."""
    with unseen():
        return (*map(_layout, args), *((name, _layout(value)) for name, value in kwargs.items()))


def _layout(value: Any) -> Any:
    if isinstance(value, Tensor):
        return None if is_host(value) else tuple(value.shape)
    if isinstance(value, tuple | list):
        return tuple(map(_layout, value))
    return value if value is None or isinstance(value, int | float | str) else type(value)


def _same_values(some: list[Crossing], others: list[Crossing]) -> bool:
    return len(some) == len(others) and all(torch.equal(a.value, b.value) for a, b in zip(some, others))


def _outermost(runs: list[_ModuleRun]) -> dict[str, list[_ModuleRun]]:
    """Calls, in order, of the submodules all of whose calls are quiet; without those that only such ones call."""
    quiet: dict[str, bool] = {}
    stack = list(runs)
    while stack:
        run = stack.pop()
        quiet[run.path] = quiet.get(run.path, True) and run.quiet
        stack += run.inner
    found: dict[str, list[_ModuleRun]] = {}
    stack = runs[::-1]
    while stack:
        run = stack.pop()
        if quiet[run.path]:
            found.setdefault(run.path, []).append(run)
        else:
            stack += run.inner[::-1]
    return found


def _without_contents(output: Any) -> bool:
    """Whether a result is the same for every batch of these shapes: traced tensors, and nothing that numbers are in."""
    return all(leaf is None or isinstance(leaf, FakeTensor) for leaf in tree_leaves(output))


class _CountingMode(CrossingMode):
    """Also counts the operations that ran on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.host_calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = len(self.calls)
        result = super().__torch_function__(func, types, args, kwargs)
        if len(self.calls) == before and getattr(func, "__name__", "") not in ("__get__", "__set__"):
            self.host_calls += 1
        return result

    @property
    def progress(self) -> tuple[int, ...]:
        return self.host_calls, len(self.crossings), self.known_values


@contextlib.contextmanager
def watch_modules(model: nn.Module, mode: _CountingMode) -> Iterator[list[_ModuleRun]]:
    """Record every call of a submodule into the list that is given."""
    runs: list[_ModuleRun] = []
    started: list[tuple[tuple[int, ...], _ModuleRun]] = []
    handles = []

    def before(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            started.append((mode.progress, _ModuleRun(path, _given(args, kwargs))))

        return hook

    def after(module: nn.Module, args: Any, output: Any) -> None:
        progress, run = started.pop()
        run.output, run.quiet = output, mode.progress == progress and _without_contents(output)
        (started[-1][1].inner if started else runs).append(run)

    for path, module in model.named_modules():
        if path:
            handles += [
                module.register_forward_pre_hook(before(path), with_kwargs=True),
                module.register_forward_hook(after),
            ]
    try:
        yield runs
    finally:
        for handle in handles:
            handle.remove()


def _check_same(first: Recording, other: Recording) -> None:
    """The batch must trace to the captured graph: same operations, same shapes, bounds of segments apart."""
    for number, (ours, theirs) in enumerate(zip(first.calls, other.calls)):
        if ours != theirs:
            raise LoweringError(
                f"this batch changes the graph at traced operation {number}: {theirs}, captured as {ours}. "
                "Pad batches to one budget, or capture with an example of this kind"
            )
    if len(first.calls) != len(other.calls) or len(first.crossings) != len(other.crossings):
        raise LoweringError(
            f"this batch changes the graph: {len(other.calls)} traced operations and {len(other.crossings)} metadata "
            f"tensors, captured with {len(first.calls)} and {len(first.crossings)}. Pad batches to one budget"
        )


def fit(crossing: Crossing, captured: Tensor, number: int) -> Tensor:
    """The value of a crossing in the captured shape; segment bounds are filled up with empty segments."""
    value = crossing.value
    if value.shape == captured.shape and value.dtype == captured.dtype:
        return value
    if not crossing.bounds_only or value.dim() != 1 or value.dtype != captured.dtype:
        raise InputError(
            f"metadata tensor {number} of this batch has shape {list(value.shape)}, the graph takes "
            f"{list(captured.shape)}: pad the batch to the budget"
        )
    if value.shape[0] > captured.shape[0]:
        raise InputError(
            f"this batch has {value.shape[0] - 1} attention segments, the budget holds {captured.shape[0] - 1}: "
            "raise `segments`, or pack fewer images into a batch"
        )
    return torch.cat([value, value[-1:].expand(captured.shape[0] - value.shape[0])])
