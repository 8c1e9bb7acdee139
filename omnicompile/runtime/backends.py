"""Ways to run a lowered graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from omnicompile.lowering.regions import compile_regions
from omnicompile.lowering.step_graph import trace_step
from omnicompile.passes.dropout import expand_dropout
from omnicompile.passes.rank_program import RankProgram

Function = Callable[..., tuple[Tensor, ...]]
Compile = Callable[[fx.GraphModule], Function]


def run_graph(gm: fx.GraphModule) -> Function:
    return gm


def move_to(gm: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """Graphs are traced on the CPU: tensors that this one makes, it shall make on `device`. Changes `gm` in place."""
    if device.type == "cpu":
        return gm
    for node in gm.graph.nodes:
        if node.op == "call_function" and any(isinstance(x, torch.device) for x in [*node.args, *node.kwargs.values()]):
            node.args = tuple(device if isinstance(x, torch.device) else x for x in node.args)
            node.kwargs = {k: device if isinstance(x, torch.device) else x for k, x in node.kwargs.items()}
    gm.recompile()
    return gm


def step_with(compile: Compile, device: torch.device, program: RankProgram) -> tuple[Function, tuple[str, ...]]:
    """The step graph of `program` on `device` as a function, and the placeholders whose gradients it gives."""
    step = trace_step(program)
    return compile(move_to(step.gm, device)), step.gradients


def _inductor(module: fx.GraphModule, dynamic: bool) -> Function:
    return torch.compile(expand_dropout(module), dynamic=dynamic, fullgraph=True)


def _by_regions(gm: fx.GraphModule) -> Function:
    """Each distinct region of compute between collectives is compiled once, whatever the model's depth."""
    return compile_regions(gm, _inductor)[0]


@dataclass(frozen=True)
class Backend:
    """compile: of the forward. make_step: of forward and backward as one graph; None: autograd does the backward."""

    compile: Compile
    make_step: Callable[[torch.device, RankProgram], tuple[Function, tuple[str, ...]]] | None = None


BACKENDS: Mapping[str, Backend] = {
    "eager": Backend(run_graph),
    "torch.compile": Backend(torch.compile),
    "aot_eager": Backend(partial(torch.compile, backend="aot_eager")),
    "step": Backend(run_graph, partial(step_with, run_graph)),
    "inductor": Backend(run_graph, partial(step_with, _by_regions)),
}
