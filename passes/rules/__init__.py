"""The placement rules of operators, one file per family. `RULES` is the whole table."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from omnicompile.passes.rules import anchors, index, kernels, matmul, pointwise, reduce, shape, views
from omnicompile.passes.rules.base import Rule

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        **pointwise.RULES,
        **views.RULES,
        **shape.RULES,
        **matmul.RULES,
        **index.RULES,
        **reduce.RULES,
        **anchors.RULES,
        **kernels.RULES,
    }
)
