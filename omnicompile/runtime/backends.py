"""Ways to run a lowered graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from omnicompile.lowering.step_graph import trace_step
from omnicompile.passes.rank_program import RankProgram

Function = Callable[..., tuple[Tensor, ...]]
Compile = Callable[[fx.GraphModule], Function]


def run_graph(gm: fx.GraphModule) -> Function:
    return gm


def step_with(compile: Compile, program: RankProgram) -> tuple[Function, tuple[str, ...]]:
    """The step graph of `program` as a function, and the placeholders whose gradients it gives."""
    step = trace_step(program)
    return compile(step.gm), step.gradients


@dataclass(frozen=True)
class Backend:
    """compile: of the forward. make_step: of forward and backward as one graph; None: autograd does the backward."""

    compile: Compile
    make_step: Callable[[RankProgram], tuple[Function, tuple[str, ...]]] | None = None


BACKENDS: Mapping[str, Backend] = {
    "eager": Backend(run_graph),
    "torch.compile": Backend(torch.compile),
    "aot_eager": Backend(partial(torch.compile, backend="aot_eager")),
    "step": Backend(run_graph, partial(step_with, run_graph)),
    "inductor": Backend(torch.compile, partial(step_with, torch.compile)),
}
