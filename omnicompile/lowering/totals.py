"""Which numbers that a model's host code computes are sums over what is in the batch: how many tokens count, say.

Data ranks have micro-batches of their own. A sum over the tokens of one, unlike another number that is made of them, is
known to be that of all ranks' once it is averaged over them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from omnicompile.capture.host_mode import is_host

_T = torch.Tensor
_SUMS = frozenset({torch.sum, _T.sum, torch.mean, _T.mean, torch.count_nonzero, _T.count_nonzero})
_CASTS = frozenset({_T.to, _T.type, _T.float, _T.double, _T.half, _T.bfloat16, _T.long, _T.int, _T.detach, _T.clone})
# Of a sum and a number, and of two sums. A least value (clamp) keeps a sum where there is anything to sum up.
_WITH_NUMBER = frozenset(
    {
        torch.add, _T.add, _T.__add__, _T.__radd__, torch.sub, _T.sub, _T.__sub__, torch.mul, _T.mul, _T.__mul__,
        _T.__rmul__, torch.div, _T.div, _T.__truediv__, torch.clamp, _T.clamp, torch.clamp_min, _T.clamp_min,
        torch.clip, _T.clip,
    }
)  # fmt: skip
_OF_TWO = frozenset({torch.add, _T.add, _T.__add__, _T.__radd__, torch.sub, _T.sub, _T.__sub__})


class Totals:
    """Remembers host tensors of no dimensions that are sums over entries of a batch, up to a factor and a constant."""

    def __init__(self) -> None:
        self._found: dict[int, Tensor] = {}  # the tensor is kept, so that its id stays its own

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._found

    def note(self, func: Callable[..., Any], args: tuple[Any, ...], result: Any) -> None:
        """An operation ran on the host."""
        if is_host(result) and result.numel() == 1 and self._is_total(func, args):
            self._found[id(result)] = result

    def _is_total(self, func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
        if not args or not isinstance(args[0], Tensor):
            return False
        if func in _SUMS:
            return args[0].dim() > 0 or args[0] in self
        tensors = [x for x in args if isinstance(x, Tensor)]
        if not all(x in self for x in tensors):
            return False
        if len(tensors) == 1:
            return func in _WITH_NUMBER or func in _CASTS
        return func in _OF_TWO
