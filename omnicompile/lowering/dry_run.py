"""One rank of a plan at full size, without a GPU and without weights: its real graph, its memory and its time.

The forward is captured and lowered, and the step graph (forward, loss, backward) traced on fake tensors of the rank's
own shapes. Memory is the peak of a liveness walk over that graph. Time is a simulation of the graph in its own order,
priced kernel by kernel. Nothing of the planner is used.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from omnicompile.capture.classify import is_view
from omnicompile.cluster import Cluster
from omnicompile.cost_model.collectives import channel, collective_seconds
from omnicompile.cost_model.hardware import Hardware, load_hardware
from omnicompile.cost_model.kernels import attention_seconds, gemm_seconds, grouped_gemm_seconds, memory_seconds
from omnicompile.cost_model.schedule import COMPUTE, Dep, Loop, Schedule, Task
from omnicompile.cost_model.timeline import Timeline, simulate
from omnicompile.lowering.full_size import full_program
from omnicompile.lowering.step_graph import trace_step
from omnicompile.lowering.tiny import Batch
from omnicompile.passes import lower_forward
from omnicompile.passes.liveness import Rows, balanced_rows, launch_of, peak_bytes, storages_bytes, tensor_bytes
from omnicompile.passes.rank_program import GROUP_PREFIX, RankProgram, group_ranks
from omnicompile.plan import Mesh, Plan

_c10d = torch.ops._c10d_functional
_oc = torch.ops.omnicompile
_aten = torch.ops.aten
_WAIT = _c10d.wait_tensor.default
_COLLECTIVES = {
    _c10d.all_gather_into_tensor.default: "all_gather",
    _c10d.all_gather_into_tensor_coalesced.default: "all_gather",
    _c10d.reduce_scatter_tensor.default: "reduce_scatter",
    _c10d.reduce_scatter_tensor_coalesced.default: "reduce_scatter",
    _c10d.all_reduce.default: "all_reduce",
    _c10d.all_to_all_single.default: "all_to_all",
}
_PRODUCTS = (_aten.mm.default, _aten.bmm.default, _aten.addmm.default)
_ADAM_STATES = 2


@dataclass(frozen=True)
class DryRun:
    """Of one rank and one micro-step. peak_bytes: parameters and gradients included, without optimizer_bytes (of Adam).
    collectives: (kind, axes) -> (number, bytes). nodes: of the step graph. timeline: its kernels one by one in the
    graph's order, pointwise operators fused with their neighbours."""

    nodes: int
    peak_bytes: int
    peak_at: str
    parameter_bytes: int
    optimizer_bytes: int
    collectives: dict[tuple[str, str], tuple[int, int]]
    timeline: Timeline

    @property
    def seconds(self) -> float:
        return self.timeline.seconds


def dry_run(model: nn.Module, batch: Batch, plan: Plan) -> DryRun:
    """model: on the meta device. batch: as `full_batch` makes it. Raises what capturing and lowering raise."""
    full = full_program(model, batch, plan)
    return dry_run_program(lower_forward(full.before), full.host, plan.cluster)


def dry_run_program(program: RankProgram, host: Mapping[str, Tensor], cluster: Cluster) -> DryRun:
    """program: lowered, groups not bound. host: metadata by placeholder, for the lengths of attention's segments."""
    gm = trace_step(program).gm
    rows = balanced_rows(gm.graph)
    peak = peak_bytes(gm, rows)
    states = {n.name: tensor_bytes(n.meta["val"], rows) for n in gm.graph.find_nodes(op="placeholder")}
    parameters = sum(states[name] for name in program.params)
    trained = sum(states[name] for name, spec in program.params.items() if spec.trainable)
    prices = _Prices(program.mesh, cluster, host, rows)
    return DryRun(
        nodes=len(gm.graph.nodes),
        peak_bytes=peak.total,
        peak_at=peak.node,
        parameter_bytes=parameters,
        optimizer_bytes=_ADAM_STATES * trained,
        collectives=_counted(gm.graph, rows),
        timeline=simulate(Schedule((Loop("step", tuple(prices.tasks(gm.graph)), 1),))),
    )


def _axes(node: fx.Node) -> str:
    return str(node.args[-1]).removeprefix(GROUP_PREFIX)


def _volume(node: fx.Node, rows: Rows) -> int:
    """Bytes of the whole tensor that is gathered, scattered or reduced; of an all-to-all one rank's buffer."""
    return max(tensor_bytes(node.meta["val"], rows), storages_bytes(node.all_input_nodes, rows))


def _counted(graph: fx.Graph, rows: Rows) -> dict[tuple[str, str], tuple[int, int]]:
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for node in graph.nodes:
        if node.target in _COLLECTIVES:
            key = (_COLLECTIVES[node.target], _axes(node))
            number, nbytes = found.get(key, (0, 0))
            found[key] = (number + 1, nbytes + _volume(node, rows))
    return found


class _Prices:
    """Tasks of a step graph's nodes."""

    def __init__(self, mesh: Mesh, cluster: Cluster, host: Mapping[str, Tensor], rows: Rows) -> None:
        self.mesh, self.per_node, self.host, self.rows = mesh, cluster.gpus_per_node, host, rows
        self.hw: Hardware = load_hardware(cluster.gpu)

    def tasks(self, graph: fx.Graph) -> list[Task]:
        made: list[Task] = []
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            if node.target in _COLLECTIVES:
                made += self._collective(node)
            elif node.target is _WAIT:
                made.append(Task(node.name, COMPUTE, 0.0, "wait", after=(Dep(launch_of(node).name),)))
            elif (seconds := self._seconds(node)) > 0:
                made.append(Task(node.name, COMPUTE, seconds, _kind(node), str(node.meta.get("block", ""))))
        return made

    def _collective(self, node: fx.Node) -> list[Task]:
        ranks = group_ranks(self.mesh, _axes(node), 0)
        local = sum(rank // self.per_node == 0 for rank in ranks)
        kind = _COLLECTIVES[node.target]  # type: ignore[index]
        seconds = collective_seconds(kind, _volume(node, self.rows), len(ranks), local, self.hw)
        ready = Task(f"{node.name}.ready", COMPUTE, 0.0, "wait")
        return [ready, Task(node.name, channel(len(ranks), local), seconds, kind, after=(Dep(ready.name),))]

    def _seconds(self, node: fx.Node) -> float:
        if is_view(node) or node.target is operator.getitem or not isinstance(node.meta.get("val"), Tensor | tuple | list):
            return 0.0
        if node.target in _PRODUCTS:
            return self._product(node)
        if node.target in (_oc.attention.default, _oc.attention_backward.default):
            return self._attention(node)
        if node.target in (_oc.grouped_mm.default, _oc.grouped_mm_weight.default):
            return self._grouped(node)
        return memory_seconds(self._moved(node), self.hw)

    def _moved(self, node: fx.Node) -> float:
        """Bytes that a memory-bound kernel reads and writes, what stays inside a chain of pointwise operators left
        out."""
        own = _pointwise(node)
        reads = [s for s in node.all_input_nodes if not (own and _pointwise(s) and len(s.users) == 1)]
        nbytes = sum(tensor_bytes(source.meta.get("val"), self.rows) for source in reads)
        inside = own and len(node.users) == 1 and _pointwise(next(iter(node.users)))
        return nbytes if inside else nbytes + tensor_bytes(node.meta.get("val"), self.rows)

    def _product(self, node: fx.Node) -> float:
        a, b = (_tensor(x) for x in node.args[-2:])
        batch = a.shape[0] if a.dim() == 3 else 1
        return gemm_seconds(a.shape[-2], b.shape[-1], a.shape[-1], batch, _dtype(a), self.hw)

    def _attention(self, node: fx.Node) -> float:
        backward = node.target is _oc.attention_backward.default
        q, k, v = (_tensor(x) for x in node.args[1:4]) if backward else (_tensor(x) for x in node.args[:3])
        cu_q, cu_k = node.args[6:8] if backward else node.args[3:5]
        causal = next(x for x in node.args[8:] if isinstance(x, bool))
        pairs = self._pairs(cu_q, cu_k)
        if pairs is None:
            pairs = float(q.shape[0] * q.shape[2] * k.shape[2])
        return attention_seconds(
            q.shape[1], k.shape[1], q.shape[3], v.shape[3], pairs, q.shape[0] * q.shape[2], k.shape[0] * k.shape[2],
            causal, backward, _dtype(q), self.hw,
        )  # fmt: skip

    def _pairs(self, cu_q: object, cu_k: object) -> float | None:
        """Sum over segments of the products of their lengths, from the batch's own bounds."""
        bounds = [self.host.get(_origin(x)) if isinstance(x, fx.Node) else None for x in (cu_q, cu_k)]
        if bounds[0] is None or bounds[1] is None:
            return None
        return float((bounds[0].diff().double() * bounds[1].diff().double()).sum())

    def _grouped(self, node: fx.Node) -> float:
        first, second = (_tensor(x) for x in node.args[:2])
        whole = _tensor(node) if second.dim() == 2 else second  # [experts, a, b], of the weight gradient the result
        tokens = tensor_bytes(first, self.rows) / (first.element_size() * int(first.shape[1]))
        experts = whole.shape[0]
        return grouped_gemm_seconds(
            tokens / experts, whole.shape[1], whole.shape[2], experts, _dtype(first), self.hw
        )  # fmt: skip


def _tensor(node: object) -> Tensor:
    assert isinstance(node, fx.Node)
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _origin(node: fx.Node) -> str:
    """The placeholder that a value is a copy or view of."""
    while node.op != "placeholder" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node.name


def _pointwise(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return node.op == "call_function" and torch.Tag.pointwise in tags


def _kind(node: fx.Node) -> str:
    if node.target in _PRODUCTS:
        return "gemm"
    if "attention" in str(node.target):
        return "attention"
    return "grouped_gemm" if "grouped" in str(node.target) else "memory"
