"""Evaluate a model's host-side metadata for real while the rest is traced.

Vision and audio front ends loop over `grid_thw.tolist()`, `cu_seqlens` or feature lengths. An operation whose tensor
inputs are all small, real, integer host tensors runs outside the tracer, so such loops see numbers; everything else is
traced as usual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from omnicompile.capture.wide_masks import WideMasks
from omnicompile.torch_compat import is_plain_host_tensor, outside_tracing

# Host metadata is a few entries per token; past this many elements a tensor is data, and evaluating it for real (an
# S x S mask, say) would cost memory that tracing must not cost.
MAX_HOST_ELEMENTS = 1 << 25

_FACTORIES = frozenset(
    {torch.arange, torch.tensor, torch.as_tensor, torch.zeros, torch.ones, torch.full, torch.empty, torch.linspace}
)
_INTEGER_DTYPES = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


# Operations whose arguments after the first are sizes, where a host integer is a number.
_SIZED = frozenset(
    {
        torch.Tensor.view, torch.Tensor.reshape, torch.Tensor.expand, torch.Tensor.repeat, torch.Tensor.split,
        torch.Tensor.narrow, torch.Tensor.unflatten, torch.Tensor.chunk, torch.reshape, torch.split, torch.narrow,
        torch.chunk,
    }
)  # fmt: skip
# What these make of an input without padding has none either.
_KEEPS_DATA = frozenset(
    {
        torch.Tensor.to, torch.Tensor.type, torch.Tensor.view, torch.Tensor.reshape, torch.Tensor.flatten,
        torch.Tensor.contiguous, torch.Tensor.sum, torch.sum,
    }
)  # fmt: skip
_ITEMS = frozenset({torch.Tensor.__getitem__, torch.Tensor.__setitem__})
_EQUALS = frozenset({torch.Tensor.__eq__, torch.Tensor.eq, torch.eq})
_DIFFERS = frozenset({torch.Tensor.__ne__, torch.Tensor.ne, torch.ne})


def _tensors_in(values: Iterable[Any]) -> list[torch.Tensor]:
    """Those among arguments and in lists, tuples and dicts of them; `tree_leaves` takes most of a small call's time."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _tensors_in(value)
        elif isinstance(value, dict):
            found += _tensors_in(value.values())
    return found


def is_host(value: object) -> bool:
    return is_plain_host_tensor(value) and value.numel() <= MAX_HOST_ELEMENTS  # type: ignore[attr-defined]


def _grows(tensors: list[torch.Tensor]) -> bool:
    """Whether host tensors make data of each other: the distances of S positions from S others, say."""
    if len(tensors) < 2 or math.prod(t.numel() for t in tensors) <= MAX_HOST_ELEMENTS:
        return False
    try:
        return math.prod(torch.broadcast_shapes(*(t.shape for t in tensors))) > MAX_HOST_ELEMENTS
    except RuntimeError:
        return False


def _makes_host_integers(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """A factory call that makes an integer tensor on the host: `torch.arange(n)`, `torch.tensor([1, 2])`, ..."""
    if func not in _FACTORIES:
        return False
    device = kwargs.get("device")
    if device is not None and torch.device(device).type not in ("cpu", "meta"):
        return False
    leaves = tree_leaves((args, kwargs))
    if any(isinstance(leaf, torch.SymInt | torch.Tensor) for leaf in leaves):
        return False
    dtype = kwargs.get("dtype")
    if dtype is not None:
        return dtype in _INTEGER_DTYPES
    if func not in (torch.arange, torch.tensor, torch.as_tensor):
        return False
    return not any(isinstance(leaf, float | complex) for leaf in tree_leaves(args))


def _mask_to_indices(index: Any, shape: torch.Size) -> tuple[Any, ...] | None:
    """`x[mask]` with a host mask as an index of fixed size, x being of `shape`; None when there is no such mask. With a
    mask, how many rows there are would be found on the device, and the host wait for it."""
    parts = index if isinstance(index, tuple) else (index,)
    if not any(is_host(p) and p.dtype == torch.bool for p in parts):
        return None
    first = parts[0]
    if is_host(first) and first.dtype == torch.bool and first.shape != shape[: first.dim()]:
        raise IndexError(f"a mask of shape {list(first.shape)} does not match an indexed tensor of {list(shape)}")
    result: list[Any] = []
    for part in parts:
        if is_host(part) and part.dtype == torch.bool:
            with outside_tracing():
                result.extend(part.nonzero(as_tuple=True))
        else:
            result.append(part)
    return tuple(result)


def _moves_rows(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """`x[i]`, or `x[i] = rows`. Where a single number is written, a mask does better: nothing is looked up."""
    if func is torch.Tensor.__setitem__:
        return isinstance(args[2], torch.Tensor) and args[2].dim() > 0 and isinstance(args[0], torch.Tensor)
    return func is torch.Tensor.__getitem__


def _number(value: Any) -> Any:
    """A host integer of no dimensions as an int; lists, tuples and slices with such numbers in them likewise."""
    if is_host(value) and value.dim() == 0 and value.dtype in _INTEGER_DTYPES - {torch.bool}:
        with outside_tracing():
            return int(value)
    if isinstance(value, slice):
        return slice(_number(value.start), _number(value.stop), _number(value.step))
    if type(value) in (tuple, list):
        return type(value)(_number(item) for item in value)
    return value


def _with_numbers(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Sizes and bounds in an operation on traced tensors are numbers, not host tensors: `x[:, : lengths[0]]`."""

    def number(value: Any, place: int) -> Any:
        sized = isinstance(value, slice | tuple | list) or (place > 0 and func in _SIZED)
        return _number(value) if sized else value

    return tuple(number(a, i) for i, a in enumerate(args)), {k: number(v, 1) for k, v in kwargs.items()}


class HostMode(TorchFunctionMode):
    """Active while a model is traced. See the module's docstring.

    without_padding: example inputs of which no element is 0. Models look for padding by comparing inputs with 0; on
    these, the answer is known without values.
    """

    def __init__(self, without_padding: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self._full: dict[int, torch.Tensor] = {id(t): t for t in without_padding}
        self._wide = WideMasks()

    def add_without_padding(self, tensors: Iterable[torch.Tensor]) -> None:
        """Further inputs of which no element is 0."""
        self._full |= {id(t): t for t in tensors}

    def _padding(self, func: Callable[..., Any], args: tuple[Any, ...]) -> torch.Tensor | None:
        """Where an input without padding is 0 (nowhere), or differs from 0; None for any other question."""
        if func not in _EQUALS | _DIFFERS or id(args[0]) not in self._full or type(args[1]) not in (int, float):
            return None
        if args[1] != 0 or args[0].numel() > MAX_HOST_ELEMENTS:
            return None
        with outside_tracing():
            return torch.full(tuple(args[0].shape), func in _DIFFERS, device="cpu")

    def on_host(self, func: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
        """Called after an operation that ran on the host."""

    def traced(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run what is not host metadata. Host tensors among the arguments enter the graph as constants here."""
        return func(*args, **kwargs)

    def _as_data(self, value: Any) -> Any:
        """A host tensor as a traced one of equal values: what only has constants for operands is run and not traced."""
        if not is_host(value):
            return value
        zeros = self.traced(torch.zeros, (value.shape,), {"dtype": value.dtype, "device": "cpu"})
        return self.traced(torch.logical_or if value.dtype == torch.bool else torch.add, (zeros, value), {})

    def _rows(self, func: Callable[..., Any], args: tuple[Any, ...], positions: torch.Tensor) -> Any:
        """`x[mask]` or `x[mask] = value` with a mask that stands for `positions` of x: all elements of those rows."""
        with outside_tracing():
            indices = positions.nonzero(as_tuple=True)
        if func is torch.Tensor.__getitem__:
            return self.traced(torch.Tensor.flatten, (self.traced(func, (args[0], indices), {}),), {})
        value = args[2]
        if isinstance(value, torch.Tensor) and value.dim():
            value = self.traced(torch.Tensor.reshape, (value, (-1, args[0].shape[-1])), {})
        return self.traced(func, (args[0], indices, value), {})

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__ if hasattr(func, "__name__") else ""
        if name in ("__get__", "__set__"):
            return func(*args, **kwargs)
        tensors = _tensors_in((*args, *kwargs.values()))
        if tensors:
            on_host = all(is_host(t) for t in tensors)
            if on_host and _grows(tensors):
                return self.traced(func, (self._as_data(args[0]), *args[1:]), kwargs)
        else:
            on_host = _makes_host_integers(func, args, kwargs)
        if on_host:
            if kwargs.get("device") is not None and not tensors:
                kwargs = {**kwargs, "device": "cpu"}
            with outside_tracing():
                result = func(*args, **kwargs)
            self.on_host(func, args, kwargs, result)
            self._wide.follow(func, args, kwargs, result)
            return result
        if _moves_rows(func, args) and (indices := _mask_to_indices(args[1], args[0].shape)) is not None:
            return self.traced(func, (args[0], indices, *args[2:]), {})
        if func in _ITEMS and (positions := self._wide.positions(args[1])) is not None:
            return self._rows(func, args, positions)
        if self._full and (answer := self._padding(func, args)) is not None:
            return answer
        result = self.traced(func, *_with_numbers(func, args, kwargs))
        self._wide.follow(func, args, kwargs, result)
        if func in _KEEPS_DATA and id(args[0]) in self._full and isinstance(result, torch.Tensor):
            self.add_without_padding([result])
        return result
