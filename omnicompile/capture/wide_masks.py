"""Host masks of positions that a model expands over the width of its features.

`features[mask[..., None].expand_as(features)]` selects whole rows, yet element by element: a mask of as many elements
as the features is no metadata any more, and what it selects has a size that tracing does not know. The positions are
known, so such a mask is remembered by them, and selecting with it selects rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from omnicompile.torch_compat import is_plain_host_tensor, outside_tracing

_EXPANDS = frozenset({Tensor.expand, Tensor.expand_as, torch.broadcast_to})
# What these make of such a mask is one too.
_KEEPS = frozenset(
    {
        Tensor.bool, Tensor.to, Tensor.contiguous, Tensor.__invert__, Tensor.logical_not, Tensor.bitwise_not,
        torch.logical_not, torch.bitwise_not,
    }
)  # fmt: skip


class WideMasks:
    """The expanded masks of one trace, with the positions [...] that each [..., width] stands for."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, Tensor]] = {}  # the mask is kept, so that its id stays its own

    def positions(self, value: object) -> Tensor | None:
        found = self._known.get(id(value))
        return None if found is None else found[1]

    def follow(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: object) -> None:
        """Called after every operation: remembers `result` if it is such a mask."""
        if func in _EXPANDS and isinstance(result, Tensor):
            source = args[0]
            if not is_plain_host_tensor(source) or source.dtype.is_floating_point or source.dim() != result.dim() > 1:
                return
            if source.shape[-1] == 1 < result.shape[-1]:
                with outside_tracing():
                    self._known[id(result)] = result, source[..., 0].expand(result.shape[:-1])
        elif func in _KEEPS and isinstance(result, Tensor) and (before := self.positions(args[0])) is not None:
            with outside_tracing():
                self._known[id(result)] = result, func(before, *args[1:], **kwargs)
