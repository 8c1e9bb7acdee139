"""How a compiled region is called: its function is found once, and not looked for again in every step.

`torch.compile` checks at every call that its inputs are as they were when it compiled. In a graph with fixed shapes
they are, and on a GPU the checks of all regions are a good part of the time that a small step waits for its host. So a
call in the graph finds the function for its inputs (shapes, strides, dtypes, devices) the first time, and keeps it.
What Inductor writes checks sizes and strides itself: where a later batch has other strides, the function is found anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

Function = Callable[..., Any]
CompileFor = Callable[[fx.GraphModule, tuple[Any, ...]], Function]


def input_layouts(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a function compiled for fixed shapes depends on."""
    return tuple((x.dtype, x.device, x.shape, x.stride()) if isinstance(x, Tensor) else (type(x), x) for x in inputs)


class FixedShapes:
    """The functions of one region, which its calls share: one for each layout of the inputs, made when first met.

    module: the region. compile: makes a function of it for such inputs.
    """

    def __init__(self, module: fx.GraphModule, compile: CompileFor) -> None:
        self._module, self._compile = module, compile
        self._made: dict[tuple[Any, ...], Function] = {}

    def function_for(self, inputs: tuple[Any, ...], layouts: tuple[Any, ...]) -> Function:
        if layouts not in self._made:
            self._made[layouts] = self._compile(self._module, inputs)
        return self._made[layouts]


class FixedCall(nn.Module):
    """One call of a region in a graph."""

    def __init__(self, region: FixedShapes) -> None:
        super().__init__()
        self._region = region
        self._layouts: tuple[Any, ...] | None = None
        self._function: Function = self._find

    def forward(self, *inputs: Any) -> Any:
        try:
            return self._function(*inputs)
        except AssertionError:
            if input_layouts(inputs) == self._layouts:
                raise
        return self._find(*inputs)

    def _find(self, *inputs: Any) -> Any:
        self._layouts = input_layouts(inputs)
        self._function = self._region.function_for(inputs, self._layouts)
        return self._function(*inputs)
