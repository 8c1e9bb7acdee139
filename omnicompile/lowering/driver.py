"""From a captured forward and a plan to the program of one rank."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from omnicompile.capture.regions import modality_of_input
from omnicompile.errors import LoweringError
from omnicompile.lowering.graph_capture import CapturedForward
from omnicompile.lowering.placing import assign_blocks, token_dim
from omnicompile.passes.loss import is_mean_loss
from omnicompile.passes.propagate import module_of, schema_values
from omnicompile.passes.rank_program import InputSpec, ParamSpec, RankProgram
from omnicompile.plan import Plan

Lower = Callable[[RankProgram], RankProgram]


@dataclass(frozen=True)
class MasterWeights:
    """dtype: what is stored and optimized. frozen: names of parameters that are not trained."""

    dtype: torch.dtype | None = torch.float32
    frozen: frozenset[str] = frozenset()


def default_lower(program: RankProgram) -> RankProgram:
    from omnicompile.passes import lower_forward

    return lower_forward(program)


def dtype_named(name: str) -> torch.dtype:
    """The torch dtype called `name` ("bfloat16"). Raises LoweringError for another word."""
    value = vars(torch).get(name)
    if not isinstance(value, torch.dtype):
        raise LoweringError(f"the plan names a dtype {name!r}, which torch does not have")
    return value


def with_outputs(captured: CapturedForward, names: Collection[str]) -> CapturedForward:
    """The same forward, computing only the outputs in `names`, in that order."""
    graph = fx.Graph()
    memo: dict[fx.Node, fx.Node] = {}
    values = graph.graph_copy(captured.gm.graph, memo)
    assert isinstance(values, tuple | list)
    graph.output(tuple(values[captured.outputs.index(name)] for name in names))
    for old, new in memo.items():
        new.meta = dict(old.meta)
    graph.eliminate_dead_code()
    return CapturedForward(
        fx.GraphModule(captured.gm, graph),
        captured.params,
        captured.buffers,
        captured.constants,
        captured.inputs,
        captured.host,
        tuple(names),
        captured.numbers,
    )


def rank_program(
    captured: CapturedForward,
    plan: Plan,
    requires_grad: Mapping[str, bool],
    lengths: Collection[int],
    stored: torch.dtype,
) -> RankProgram:
    """What the passes start from: every placeholder whole.

    requires_grad: by parameter name. lengths: sizes that count tokens or patches. stored: dtype of the master weights.
    """
    assign_blocks(captured.gm, plan.blocks, _sources(captured))
    nodes = {node.name: node for node in captured.gm.graph.find_nodes(op="placeholder")}
    params = {}
    for placeholder, name in captured.params.items():
        node = nodes[placeholder]
        block = plan.blocks.get(node.meta["block"])
        trainable = requires_grad[name] and not (block is not None and block.frozen)
        value: Tensor = node.meta["val"]
        dtype = stored if value.is_floating_point() else value.dtype
        params[placeholder] = ParamSpec(name, tuple(value.shape), trainable, dtype)
    inputs = {p: InputSpec(name, "buffer") for p, name in captured.buffers.items()}
    inputs |= {p: InputSpec(f"constant:{p}", "buffer") for p in captured.constants}
    for placeholder, name in captured.inputs.items():
        inputs[placeholder] = InputSpec(name, "input", token_dim(nodes[placeholder].meta["val"], lengths))
    for placeholder in captured.host:
        value = nodes[placeholder].meta["val"]
        number = captured.numbers.get(placeholder, "")
        inputs[placeholder] = InputSpec(placeholder, "host", token_dim(value, lengths), of_batch=number)
    compute = dtype_named(plan.param_dtype)
    return RankProgram(
        gm=captured.gm,
        mesh=plan.mesh,
        blocks=dict(plan.blocks),
        params=params,
        inputs=inputs,
        param_dtype=None if compute == stored else compute,
        reduce_dtype=dtype_named(plan.reduce_dtype),
        loss_head=plan.loss_head,
        overlap=plan.overlap,
        cluster=plan.cluster,
        compute_weights=plan.offload_optimizer,
    )


def _sources(captured: CapturedForward) -> dict[str, frozenset[str]]:
    """Placeholder -> names of the batch's tensors that decide its block: float inputs, and host tensors made of text.
    Host metadata of other modalities goes with the features that it is used with."""
    found = {placeholder: frozenset([name]) for placeholder, name in captured.inputs.items()}
    for placeholder, names in captured.host.items():
        found[placeholder] = frozenset(name for name in names if modality_of_input(name) == "text")
    return found


@dataclass(frozen=True)
class _LossTargets:
    """The graph's own computation of one loss's targets, cut out, with the placeholders that it reads."""

    gm: fx.GraphModule
    names: tuple[str, ...]
    ignore: int

    def count(self, values: Mapping[str, Tensor]) -> int:
        return int((self.gm(*(values[name] for name in self.names)) != self.ignore).sum())


@dataclass(frozen=True)
class Targets:
    """Counts the targets of a batch, for each mean cross-entropy of the loss in the order of the graph."""

    losses: tuple[_LossTargets, ...]

    def counts(self, values: Mapping[str, Tensor]) -> tuple[int, ...]:
        return tuple(loss.count(values) for loss in self.losses)

    def count(self, values: Mapping[str, Tensor]) -> int:
        """Of all losses together."""
        return sum(self.counts(values))


def find_targets(captured: CapturedForward) -> Targets | None:
    """The targets of the cross-entropies whose mean the loss contains; None if it contains none.

    Raises LoweringError where it cannot be told before the step how many there are.
    """
    output = captured.gm.graph.output_node().args[0]
    assert isinstance(output, tuple | list)
    loss = output[captured.outputs.index("loss")] if "loss" in captured.outputs else None
    reached = _ancestors(loss) if isinstance(loss, fx.Node) else set()
    found = [node for node in captured.gm.graph.nodes if node in reached and is_mean_loss(node)]
    return Targets(tuple(_targets_of(captured, node) for node in found)) if found else None


def _targets_of(captured: CapturedForward, loss: fx.Node) -> _LossTargets:
    """Targets that are themselves made of data (codes of an image, say) count as targets wherever the host's part of
    the computation does not replace them by the ignored index."""
    graph = fx.Graph()
    memo: dict[fx.Node, fx.Node] = {}
    values = schema_values(loss)
    targets: fx.Node = values["target"]
    needed = _ancestors(targets)
    names: list[str] = []
    for item in captured.gm.graph.nodes:
        if item not in needed:
            continue
        value = item.meta.get("val")
        if item.op == "placeholder" and item.name in captured.host:
            names.append(item.name)
            memo[item] = graph.node_copy(item)
        elif all(source in memo for source in item.all_input_nodes) and item.op != "placeholder":
            memo[item] = graph.node_copy(item, lambda x: memo[x])
        elif isinstance(value, Tensor) and not value.is_floating_point():
            memo[item] = graph.call_function(torch.zeros, (list(value.shape),), {"dtype": value.dtype})
    if targets not in memo:
        raise LoweringError(
            f"the targets of the loss in {module_of(loss)} are not class indices, so they cannot be counted: use "
            "reduction='sum', or integer targets"
        )
    graph.output(memo[targets])
    graph.eliminate_dead_code()
    used = {node.name for node in graph.find_nodes(op="placeholder")}
    return _LossTargets(
        fx.GraphModule(captured.gm, graph), tuple(n for n in names if n in used), int(values["ignore_index"])
    )


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        item = stack.pop()
        if item not in found:
            found.add(item)
            stack += item.all_input_nodes
    return found
