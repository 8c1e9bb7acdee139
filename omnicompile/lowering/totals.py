"""Which numbers that a model's host code computes are counts over its whole batch: how many tokens have a target, say.

Data ranks have micro-batches of their own. A count over the entries of one, unlike another number that is made of them,
is known to be that of all ranks' once it is averaged over them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from omnicompile.capture.host_mode import is_host

_T = torch.Tensor
_SUMS = frozenset({torch.sum, _T.sum, torch.mean, _T.mean, torch.count_nonzero, _T.count_nonzero})
_CASTS = frozenset({_T.to, _T.type, _T.float, _T.double, _T.half, _T.bfloat16, _T.long, _T.int, _T.detach, _T.clone})
_SCALES = frozenset({torch.mul, _T.mul, _T.__mul__, _T.__rmul__, torch.div, _T.div, _T.__truediv__})
_SHIFTS = frozenset({torch.add, _T.add, _T.__add__, _T.__radd__})
_CLAMPS = frozenset({torch.clamp, _T.clamp, torch.clamp_min, _T.clamp_min, torch.clip, _T.clip})
# Entry by entry, or the same entries in another shape; `x[:, 1:]` leaves out the same of every sample.
_OF_ENTRIES = frozenset(
    {
        torch.eq, _T.eq, _T.__eq__, torch.ne, _T.ne, _T.__ne__, torch.gt, _T.gt, _T.__gt__, torch.ge, _T.ge, _T.__ge__,
        torch.lt, _T.lt, _T.__lt__, torch.le, _T.le, _T.__le__, torch.logical_and, _T.logical_and, _T.__and__,
        torch.logical_or, _T.logical_or, _T.__or__, torch.logical_not, _T.logical_not, _T.__invert__,
        torch.mul, _T.mul, _T.__mul__, torch.flatten, _T.flatten, _T.view, _T.reshape, torch.reshape, _T.contiguous,
        torch.isin, functional.pad,
    }
)  # fmt: skip
_NEGLIGIBLE = 1e-5
"""Added to a count, as a guard against dividing by zero."""


@dataclass(frozen=True)
class _Known:
    """kind: "whole" (something of every entry of a batch tensor), "total" (a sum over that, up to a factor), "number"
    (another tensor of no dimensions made of a batch) or "other". least, of: a total that is `of`, but at least so."""

    tensor: Tensor  # kept, so that its id stays its own
    kind: str
    least: float | None = None
    of: Tensor | None = None


class Totals:
    """Follows host tensors from those of the batch on."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}

    def given(self, tensor: Tensor) -> None:
        """A tensor of the batch itself, or an entry-wise comparison of one. A given number is the caller's business."""
        if tensor.dim() > 0:
            self._known[id(tensor)] = _Known(tensor, "whole")

    def kind(self, tensor: Tensor) -> str:
        """ "total", "number", or "" for what is neither."""
        known = self._known.get(id(tensor))
        return known.kind if known is not None and known.kind in ("total", "number") else ""

    def least(self, tensor: Tensor) -> tuple[Tensor, float] | None:
        """(count, least value) of a count that is held from below."""
        known = self._known.get(id(tensor))
        return None if known is None or known.of is None or known.least is None else (known.of, known.least)

    def note(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """An operation ran on the host. What it writes into is what it gives from now on."""
        inputs = [self._known.get(id(x)) for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if not is_host(result):
            return
        if not any(inputs):
            self._known.pop(id(result), None)
            return
        first = inputs[0] if args and isinstance(args[0], Tensor) else None
        self._known[id(result)] = _result(func, args, kwargs, result, first, inputs)


def _result(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    result: Tensor,
    first: _Known | None,
    inputs: Sequence[_Known | None],
) -> _Known:
    if result.dim() > 0:
        whole = all(known is not None and known.kind == "whole" for known in inputs)
        same = func in _OF_ENTRIES or func in _CASTS or (func is _T.__getitem__ and _cuts_alike(args[1]))
        return _Known(result, "whole" if whole and same else "other")
    if first is None or len(inputs) > 1:
        return _Known(result, "number")
    if _is_total(func, args, kwargs, first):
        return _Known(result, "total", first.least, first.of)
    if first.kind == "total" and first.of is None and func in _CLAMPS:
        least = _only_least(args, kwargs)
        if least is not None:
            return _Known(result, "total", least, first.tensor)
    return _Known(result, "number")


def _is_total(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], first: _Known) -> bool:
    if first.kind == "whole":
        return func in _SUMS and not set(kwargs) - {"dtype"}
    if first.kind != "total":
        return False
    if func in _CASTS:
        return True
    numbers = args[1:]
    if first.of is not None or kwargs or len(numbers) != 1 or not isinstance(numbers[0], int | float):
        return False
    return func in _SCALES or (func in _SHIFTS and abs(numbers[0]) <= _NEGLIGIBLE)


def _only_least(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float | None:
    given = dict(zip(("min", "max"), args[1:])) | dict(kwargs)
    least = given.pop("min", None)
    return float(least) if isinstance(least, int | float) and not any(v is not None for v in given.values()) else None


def _cuts_alike(index: Any) -> bool:
    """Whether an index leaves out the same positions of every sample: `x[:, 1:]`, `x[..., :-1]`."""
    parts = index if isinstance(index, tuple) else (index,)
    if not all(part is Ellipsis or isinstance(part, slice) for part in parts):
        return False
    return parts[0] is Ellipsis or parts[0] == slice(None)
