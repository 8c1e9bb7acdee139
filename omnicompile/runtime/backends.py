"""Ways to run a lowered graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from omnicompile.lowering.compiled_region import FixedShapes
from omnicompile.lowering.regions import compile_regions
from omnicompile.lowering.step_graph import StepKind, trace_step
from omnicompile.passes.dropout import expand_dropout
from omnicompile.passes.pack_scatters import pack_scatters_pass
from omnicompile.passes.rank_program import RankProgram
from omnicompile.torch_compat import CompilerBackend, compile_for, compiler_backend

Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class StepFunction:
    """run: forward and backward as a function of the forward's placeholders, and where the kind accumulates, of the
    gradients of earlier micro-steps. gradients: placeholders whose gradients follow the loss in what it gives. summed:
    those of them that are summed over replicas already."""

    run: Function
    gradients: tuple[str, ...]
    summed: frozenset[str]


@dataclass
class Compilations:
    """count: graphs that have been given to a compiler so far, again for other shapes included."""

    count: int = 0


Compile = Callable[[fx.GraphModule, Compilations], Function]


def run_graph(gm: fx.GraphModule, made: Compilations) -> Function:
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


def step_with(
    compile: Compile, device: torch.device, made: Compilations, program: RankProgram, kind: StepKind
) -> StepFunction:
    """The step graph of `program` on `device`."""
    step = trace_step(program, kind)
    if device.type == "cpu":
        pack_scatters_pass(step.gm)
    return StepFunction(compile(move_to(step.gm, device), made), step.gradients, step.summed)


def _counted(name: str, made: Compilations) -> CompilerBackend:
    """The compiler that torch.compile calls `name`, counting what it is given."""
    compiler = compiler_backend(name)

    def compile(gm: fx.GraphModule, inputs: list[Tensor]) -> Function:
        made.count += 1
        return compiler(gm, inputs)

    return compile


def _whole(name: str, gm: fx.GraphModule, made: Compilations) -> Function:
    function: Function = torch.compile(gm, backend=_counted(name, made))
    return function


def _by_regions(gm: fx.GraphModule, made: Compilations) -> Function:
    """Each distinct region of compute between collectives is compiled once, whatever the model's depth."""
    compiler = _counted("inductor", made)

    def compile(module: fx.GraphModule, dynamic: bool) -> Function | FixedShapes:
        module = expand_dropout(module)
        if not dynamic:
            return FixedShapes(module, partial(compile_for, compiler))
        function: Function = torch.compile(module, backend=compiler, dynamic=True, fullgraph=True)
        return function

    return compile_regions(gm, compile)[0]


@dataclass(frozen=True)
class Backend:
    """compile: of the forward. make_step: of forward and backward as one graph; None: autograd does the backward."""

    compile: Compile
    make_step: Callable[[torch.device, Compilations, RankProgram, StepKind], StepFunction] | None = None


BACKENDS: Mapping[str, Backend] = {
    "eager": Backend(run_graph),
    "torch.compile": Backend(partial(_whole, "inductor")),
    "aot_eager": Backend(partial(_whole, "aot_eager")),
    "step": Backend(run_graph, partial(step_with, run_graph)),
    "inductor": Backend(run_graph, partial(step_with, _by_regions)),
}
