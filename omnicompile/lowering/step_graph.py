"""Forward, loss and backward of one rank in one graph.

    step(placeholders of the forward) -> (local loss, gradient of each trained parameter's local shard, other outputs)

Everything in it is an ATen operator, an anchor or a functional collective; nothing of autograd is left. Whole
parameters are gathered again for the backward instead of being kept from the forward.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from omnicompile.cluster import Cluster
from omnicompile.errors import LoweringError
from omnicompile.lowering.step_prices import ExchangeClock, compiled
from omnicompile.passes.accumulate import accumulate_pass
from omnicompile.passes.async_ulysses import schedule_exchanges_pass
from omnicompile.passes.compute_weights import compute_weights_pass
from omnicompile.passes.known_sizes import known_sizes_pass
from omnicompile.passes.late_losses import late_losses_pass
from omnicompile.passes.liveness import Rows, balanced_rows, peak_bytes
from omnicompile.passes.no_ops import no_ops_pass
from omnicompile.passes.offload import offload_pass
from omnicompile.passes.overlap import last_unit, overlap_pass
from omnicompile.passes.rank_program import RankProgram
from omnicompile.passes.recompute import recompute_pass
from omnicompile.passes.replica_sums import sum_over_replicas_pass
from omnicompile.passes.segments import FORWARD, is_forward
from omnicompile.torch_compat import FakeTensorMode, new_fake_mode, nodes_traced_since, traced_nodes

_HANDED_ON = ("block", "role", "param", "nn_module_stack")
_c10d = torch.ops._c10d_functional
_GATHER = _c10d.all_gather_into_tensor.default
_WAIT = _c10d.wait_tensor.default


@dataclass
class StepGraph:
    """gm: takes the forward's placeholders in order. gradients: the placeholders of the parameters whose gradients
    follow the loss in the output. gathers: parameter gathers that are run again in the backward. recomputed: operators
    of the forward that are."""

    gm: fx.GraphModule
    gradients: tuple[str, ...]
    gathers: int = 0
    recomputed: int = 0
    summed: frozenset[str] = frozenset()  # placeholders whose gradients are summed over replicas in the graph
    kept: tuple[str, ...] = ()  # placeholders for gradients of earlier micro-steps, in the order of `gradients`


@dataclass(frozen=True)
class StepKind:
    """Which micro-step of an optimizer step a graph is for. accumulates: it takes the gradients of those before it and
    gives the sums. last: these are the whole gradients, which are summed over replicas too if the plan says so."""

    accumulates: bool = False
    last: bool = False


FIRST = StepKind()
ONLY = StepKind(last=True)
NEXT = StepKind(accumulates=True)
LAST = StepKind(accumulates=True, last=True)


class _MarkForward(fx.Interpreter):
    """Runs the forward while it is traced and hands its nodes' metadata on to the nodes that come of them."""

    def run_node(self, n: fx.Node) -> object:
        before = traced_nodes()
        result = super().run_node(n)
        if n.op == "call_function":
            meta = {key: n.meta[key] for key in _HANDED_ON if key in n.meta}
            for node in nodes_traced_since(before):
                node.meta.update(meta, phase=FORWARD)
        return result


def trace_step(program: RankProgram, kind: StepKind = FIRST) -> StepGraph:
    """Trace the forward's loss (its first output), its gradients, and what else the forward gives out. Groups may be
    bound or not.

    Raises LoweringError naming a trained parameter that gets no gradient although the forward uses it.
    """
    return finish_step(program, schedule_step(program), kind)


def schedule_step(program: RankProgram) -> StepGraph:
    """What all kinds of step have in common, collectives in their places."""
    forward = program.gm
    nodes = list(forward.graph.find_nodes(op="placeholder"))
    mode = new_fake_mode()
    marked = _MarkForward(forward)
    fakes = [_local_fake(program, node, mode) for node in nodes]
    trained = [i for i, node in enumerate(nodes) if node.name in program.params and program.params[node.name].trainable]
    used: list[int] = []

    def step(*arguments: Tensor) -> tuple[Tensor, ...]:
        leaves = [a.detach().requires_grad_(i in trained) for i, a in enumerate(arguments)]
        loss, *rest = marked.run(*leaves)
        found = torch.autograd.grad(loss, [leaves[i] for i in trained], allow_unused=True)
        used.extend(i for i, grad in zip(trained, found) if grad is not None)
        return (loss.detach(), *(grad for grad in found if grad is not None), *(value.detach() for value in rest))

    with mode, torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
        gm = make_fx(step)(*fakes)
    _audit(nodes, [i for i in trained if i not in used])
    _name_placeholders(gm, nodes)
    known_sizes_pass(gm)
    late_losses_pass(gm)
    recomputed = sum(layer.again for layer in recompute_pass(gm, program.blocks))
    keeps = {name for name, block in program.blocks.items() if not block.reshard}
    freed = {n.name for n in nodes if n.name in program.params and n.meta.get("block") not in keeps}
    gathers = gather_again(gm, freed - last_unit(gm))
    gradients = tuple(nodes[i].name for i in used)
    cluster = program.cluster or Cluster(gpus=program.mesh.world, gpus_per_node=program.mesh.world)
    rows = balanced_rows(gm.graph)
    clock = ExchangeClock.of(program.mesh, cluster, rows, program.bound)
    if program.overlap.exchanges:
        schedule_exchanges_pass(gm, gradients, clock, measure=partial(_compiled_peak, rows=rows))
    overlap_pass(gm, gradients, program.overlap.prefetch, lambda node: clock.exchange_seconds(node)[0])
    no_ops_pass(gm)
    return StepGraph(gm, gradients, gathers, recomputed)


def finish_step(program: RankProgram, step: StepGraph, kind: StepKind) -> StepGraph:
    """The step of this kind. Changes the graph of `step`."""
    gm, gradients = step.gm, step.gradients
    kept = accumulate_pass(gm, gradients) if kind.accumulates else ()
    summed: set[str] = set()
    if kind.last and program.overlap.replica_sums:
        summed = sum_over_replicas_pass(gm, gradients, program.params, program.bound)
    if program.compute_weights and program.param_dtype is not None:
        compute_weights_pass(gm, program.params, program.param_dtype)
    offload_pass(gm, program.blocks, program.params)
    return replace(step, summed=frozenset(summed), kept=kept)


def _compiled_peak(gm: fx.GraphModule, rows: Rows) -> int:
    return peak_bytes(gm, rows, compiled(gm), in_flight=True).total


def _local_fake(program: RankProgram, node: fx.Node, mode: FakeTensorMode) -> Tensor:
    spec = program.params.get(node.name)
    with mode:
        if spec is not None:
            return torch.empty(spec.local_shape(program.mesh), dtype=spec.dtype)
        kind = program.inputs[node.name].kind
        if kind in ("count", "rank"):
            return torch.empty((), dtype=torch.float32 if kind == "count" else torch.int64)
        value: Tensor = node.meta["val"]
        return torch.empty(value.shape, dtype=value.dtype)


def _audit(nodes: list[fx.Node], unused: list[int]) -> None:
    """A parameter without gradient is right only if its values do not reach the loss."""
    for i in unused:
        seen, stack = set(), [nodes[i]]
        while stack:
            item = stack.pop()
            if item not in seen:
                seen.add(item)
                stack += item.users
        (output,) = nodes[i].graph.find_nodes(op="output")
        loss = output.args[0][0]
        if loss in seen and not any(_stops_gradient(item) for item in seen):
            raise LoweringError(f"{nodes[i].name} reaches the loss and got no gradient in the step graph")


def _stops_gradient(node: fx.Node) -> bool:
    value = node.meta.get("val")
    integer = isinstance(value, Tensor) and not value.is_floating_point()
    return integer or node.target is torch.ops.aten.detach.default


def _name_placeholders(gm: fx.GraphModule, nodes: list[fx.Node]) -> None:
    for placeholder, node in zip(gm.graph.find_nodes(op="placeholder"), nodes):
        placeholder.name = placeholder.target = node.name
        placeholder.meta.update({k: v for k, v in node.meta.items() if k not in placeholder.meta})
    gm.recompile()


def gather_again(gm: fx.GraphModule, parameters: set[str]) -> int:
    """Give the backward its own gather of each parameter, right before its first use there.

        w = wait(all_gather(shard)); y = x @ w; ...; dx = dy @ w
     -> w = wait(all_gather(shard)); y = x @ w; ...; w2 = wait(all_gather(shard)); dx = dy @ w2

    Safe: a shard does not change within a step, and all ranks run the same graph. Returns the number of gathers.
    """
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    count = 0
    for gather in [n for n in gm.graph.nodes if n.target is _GATHER and is_forward(n)]:
        source = _only_source(gather)
        if source is None or source.op != "placeholder" or source.name not in parameters:
            continue
        chain = _derived_views(gather)
        users = {user for node in chain for user in node.users if not is_forward(user) and user.op == "call_function"}
        late = sorted((u for u in users if u in order), key=lambda u: order[u])
        if late:
            _copy_before(gm.graph, sorted(chain, key=lambda n: order[n]), late)
            count += 1
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return count


def _only_source(node: fx.Node) -> fx.Node | None:
    """Follow single inputs up to where they begin."""
    while node.op != "placeholder":
        if len(node.all_input_nodes) != 1:
            return None
        node = node.all_input_nodes[0]
    return node


def _derived_views(gather: fx.Node) -> list[fx.Node]:
    """The gather, its wait, and what only re-arranges its result, as far as computed in the forward."""
    chain, stack = [gather], [gather]
    while stack:
        for user in stack.pop().users:
            if not is_forward(user) or user in chain or len(user.all_input_nodes) != 1:
                continue
            if user.target is _WAIT or _rearranges(user):
                chain.append(user)
                stack.append(user)
    return chain


_COPIES = (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)


def _rearranges(node: fx.Node) -> bool:
    target = node.target
    if target is operator.getitem:  # a piece of a split
        return _rearranges(node.all_input_nodes[0])
    return target in _COPIES or (isinstance(target, torch._ops.OpOverload) and target.is_view)


def _copy_before(graph: fx.Graph, chain: list[fx.Node], users: list[fx.Node]) -> None:
    copies: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(users[0]):
        for node in chain:
            copies[node] = graph.node_copy(node, lambda x: copies.get(x, x))
            copies[node].meta["phase"] = "gather again"
    for user in users:
        for node in list(user.all_input_nodes):
            if node in copies:
                user.replace_input_with(node, copies[node])
