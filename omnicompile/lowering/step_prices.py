"""The kernels of a step graph, and what each of them takes.

Between collectives and anchors the graph is compiled (lowering/regions.py): element-wise work and reductions of a
region become the kernels that `capture.fusion` makes of them, everything else is a kernel by itself.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from omnicompile.capture.classify import CONVOLUTIONS, MATMULS, is_free
from omnicompile.capture.fusion import fuse, group_traffic, in_one_piece, only_inside, with_siblings
from omnicompile.cluster import Cluster
from omnicompile.cost_model.collectives import channel, collective_seconds
from omnicompile.cost_model.hardware import Hardware, load_hardware
from omnicompile.cost_model.kernels import attention_seconds, gemm_seconds, grouped_gemm_seconds, memory_seconds
from omnicompile.cost_model.schedule import COMPUTE, COPY, Dep, Task
from omnicompile.lowering.regions import find_regions
from omnicompile.passes.in_place import written_over
from omnicompile.passes.liveness import Compiled, Rows, elements, launch_of, storages_bytes, tensor_bytes
from omnicompile.passes.offload_op import FETCH, FETCH_WAIT, OFFLOAD, OFFLOAD_WAIT
from omnicompile.passes.rank_program import GROUP_PREFIX, group_ranks
from omnicompile.plan import Mesh

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
    _c10d.all_reduce_coalesced_.default: "all_reduce",
    _c10d.all_to_all_single.default: "all_to_all",
}
_HOST_COPIES = {OFFLOAD: "offload", FETCH: "fetch"}
_HOST_WAITS = (OFFLOAD_WAIT, FETCH_WAIT)
_ATTENTION = (_oc.attention.default, _oc.attention_backward.default)
_GROUPED = (_oc.grouped_mm.default, _oc.grouped_mm_weight.default)
_ROWS_ONLY = (_aten.embedding.default, _aten.index.Tensor, _aten.index_select.default, _aten.gather.default)


@dataclass(frozen=True)
class Kernel:
    """Nodes that run as one, the last of them last. A node that is no tensor work is in none."""

    nodes: tuple[fx.Node, ...]


def kernels(gm: fx.GraphModule) -> list[Kernel]:
    """The kernels of a step graph (no collectives), in the order in which their last nodes stand."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    found: list[Kernel] = []
    inside: set[fx.Node] = set()
    for region in find_regions(gm):
        inside.update(region.nodes)
        found += [Kernel(tuple(sorted(group, key=order.__getitem__))) for group in fuse(list(region.nodes))]
    for node in gm.graph.nodes:
        if node not in inside and not is_free(node) and not is_collective(node) and node.target not in _HOST_COPIES:
            found.append(Kernel((node,)))
    return sorted(found, key=lambda kernel: order[kernel.nodes[-1]])


def compiled(gm: fx.GraphModule) -> Compiled:
    """How the graph's compute runs as far as memory goes: element-wise work that reads the same is one kernel too."""
    found, over = list[list[fx.Node]](), dict[fx.Node, fx.Node]()
    regions = [list(region.nodes) for region in find_regions(gm)]
    for nodes in regions:
        groups = with_siblings(nodes, fuse(nodes))
        over |= written_over(groups, in_one_piece(nodes, groups))
        found += groups
    return Compiled(found, regions, only_inside(found), over)


def is_collective(node: fx.Node) -> bool:
    return node.target in _COLLECTIVES or node.target is _WAIT


def axes_of(node: fx.Node) -> str:
    return str(node.args[-1]).removeprefix(GROUP_PREFIX)


def volume(node: fx.Node, rows: Rows) -> int:
    """Bytes of the whole tensors that are gathered, scattered or reduced; of an all-to-all one rank's buffer."""
    return max(tensor_bytes(node.meta["val"], rows), storages_bytes(node.all_input_nodes, rows))


def counted(graph: fx.Graph, rows: Rows) -> dict[tuple[str, str], tuple[int, int]]:
    """(kind, axes) -> (number of collectives, bytes)."""
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for node in graph.nodes:
        if node.target in _COLLECTIVES:
            key = (_COLLECTIVES[node.target], axes_of(node))
            number, nbytes = found.get(key, (0, 0))
            found[key] = (number + 1, nbytes + volume(node, rows))
    return found


class Prices:
    """Tasks of a step graph's kernels and collectives. host: metadata by placeholder, for the lengths of attention's
    segments."""

    def __init__(
        self,
        mesh: Mesh,
        cluster: Cluster,
        host: Mapping[str, Tensor],
        rows: Rows,
        bound: Mapping[str, str] | None = None,
    ) -> None:
        self.mesh, self.per_node, self.host, self.rows = mesh, cluster.gpus_per_node, host, rows
        self.axes = {name: axes for axes, name in (bound or {}).items()}
        self.hw: Hardware = load_hardware(cluster.gpu)

    def tasks(self, graph: fx.Graph, found: list[Kernel]) -> list[Task]:
        """In the graph's order; a collective starts when the compute stream has come to its launch."""
        return list(self._tasks(graph, {kernel.nodes[-1]: kernel for kernel in found}))

    def _tasks(self, graph: fx.Graph, ends: Mapping[fx.Node, Kernel]) -> Iterator[Task]:
        for node in graph.nodes:
            if node.target in _COLLECTIVES:
                yield from self._collective(node)
            elif node.target is _WAIT:
                yield Task(node.name, COMPUTE, 0.0, "wait", after=(Dep(launch_of(node).name),))
            elif node.target in _HOST_COPIES:
                yield from self._host_copy(node)
            elif node.target in _HOST_WAITS:
                yield Task(node.name, COMPUTE, 0.0, "wait", after=(Dep(_host_launch(node).name),))
            elif node in ends:
                seconds = self.seconds(ends[node])
                if seconds > 0:
                    yield Task(node.name, COMPUTE, seconds, kind_of(node), str(node.meta.get("block", "")))

    def _collective(self, node: fx.Node) -> list[Task]:
        stream, seconds = self.collective(node)
        ready = Task(f"{node.name}.ready", COMPUTE, 0.0, "wait")
        kind = _COLLECTIVES[node.target]  # type: ignore[index]
        return [ready, Task(node.name, stream, seconds, kind, after=(Dep(ready.name),))]

    def _host_copy(self, node: fx.Node) -> list[Task]:
        ready = Task(f"{node.name}.ready", COMPUTE, 0.0, "wait")
        kind, seconds = _HOST_COPIES[node.target], self.host_copy(_host_bytes(node, self.rows))  # type: ignore[index]
        return [ready, Task(node.name, COPY, seconds, kind, str(node.meta.get("block", "")), (Dep(ready.name),))]

    def host_copy(self, nbytes: float) -> float:
        """Seconds to move `nbytes` between a GPU and its host memory."""
        link = self.hw.host_link
        return link.latency_seconds + nbytes / link.bytes_per_second

    def collective(self, node: fx.Node) -> tuple[str, float]:
        """(the stream that it runs on, seconds)"""
        axes = axes_of(node)
        ranks, local = self._group(self.axes.get(axes, axes))
        kind = _COLLECTIVES[node.target]  # type: ignore[index]
        tensors = len(node.args[0]) if isinstance(node.args[0], list | tuple) else 1
        seconds = collective_seconds(kind, volume(node, self.rows), ranks, local, self.hw, tensors=tensors)
        return channel(ranks, local), seconds

    def _group(self, axes: str) -> tuple[int, int]:
        """(ranks, of them on one node)"""
        ranks = group_ranks(self.mesh, axes, 0)
        return len(ranks), sum(rank // self.per_node == 0 for rank in ranks)

    def staged(self, graph: fx.Graph) -> dict[fx.Node, int]:
        """Bytes of the copies that a gather makes of its result while it is on its way."""
        gathers = [node for node in graph.nodes if _COLLECTIVES.get(node.target) == "all_gather"]
        copies = self.hw.collective.gather_copies
        return {node: int(copies * tensor_bytes(node.meta["val"], self.rows)) for node in gathers} if copies else {}

    def all_reduce(self, axes: str, nbytes: float) -> float:
        """Seconds to sum a flat buffer that is packed before and unpacked after."""
        return collective_seconds("all_reduce", nbytes, *self._group(axes), self.hw) + self.memory(4 * nbytes)

    def memory(self, nbytes: float) -> float:
        return memory_seconds(nbytes, self.hw)

    def is_prefetch(self, node: fx.Node) -> bool:
        """A collective that something else than its own wait follows."""
        following = node.next
        while following.target is operator.getitem:
            following = following.next
        return node.target in _COLLECTIVES and following.target is not _WAIT

    def seconds(self, kernel: Kernel) -> float:
        node = kernel.nodes[-1]
        if len(kernel.nodes) == 1:
            if node.target in MATMULS:
                return self._product(node)
            if node.target in CONVOLUTIONS:
                return self._convolution(node)
            if node.target in _ATTENTION:
                return self._attention(node)
            if node.target in _GROUPED:
                return self._grouped(node)
            if node.target in _ROWS_ONLY:
                return memory_seconds(2 * self._bytes(node), self.hw)
        return memory_seconds(self.moved(kernel), self.hw)

    def moved(self, kernel: Kernel) -> int:
        """Bytes that a memory-bound kernel reads and writes."""
        read, written = group_traffic(list(kernel.nodes))
        return sum(self._bytes(node) for node in (*read, *written))

    def _bytes(self, node: fx.Node) -> int:
        """Of the result, without what no one takes of a tuple."""
        value = node.meta.get("val")
        if isinstance(value, tuple | list):
            taken = {user.args[1] for user in node.users if user.target is operator.getitem}
            return sum(self._size(item) for i, item in enumerate(value) if i in taken)
        return self._size(value)

    def _size(self, value: Any) -> int:
        return value.element_size() * elements(value.shape, self.rows) if isinstance(value, Tensor) else 0

    def _product(self, node: fx.Node) -> float:
        a, b = (_tensor(x) for x in node.args[-2:])
        batch = a.shape[0] if a.dim() == 3 else 1
        m, n, k = (elements([size], self.rows) for size in (a.shape[-2], b.shape[-1], a.shape[-1]))
        return gemm_seconds(m, n, k, batch, _dtype(a), self.hw)

    def _convolution(self, node: fx.Node) -> float:
        backward = node.target is _aten.convolution_backward.default
        out, _, weight = (_tensor(x) for x in (node.args[:3] if backward else (node, *node.args[:2])))
        passes = sum(bool(p) for p in node.args[10][:2]) if backward else 1  # type: ignore[index]
        rows = elements([out.shape[0], *out.shape[2:]], self.rows)
        return gemm_seconds(rows, out.shape[1], weight[0].numel(), max(passes, 1), _dtype(weight), self.hw)

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
        tokens = elements(first.shape[:1], self.rows)
        experts = whole.shape[0]
        return grouped_gemm_seconds(
            tokens / experts, whole.shape[1], whole.shape[2], experts, _dtype(first), self.hw
        )  # fmt: skip


@dataclass(frozen=True)
class ExchangeClock:
    """The `Clock` by which exchanges are scheduled. Segments of attention, which differ by batch, count as one."""

    prices: Prices

    @classmethod
    def of(cls, mesh: Mesh, cluster: Cluster, rows: Rows, bound: Mapping[str, str]) -> ExchangeClock:
        return cls(Prices(mesh, cluster, {}, rows, bound))

    def compute_seconds(self, node: fx.Node) -> float:
        return self.prices.seconds(Kernel((node,)))

    def exchange_seconds(self, node: fx.Node) -> tuple[str, float]:
        return self.prices.collective(node)


def _host_launch(wait: fx.Node) -> fx.Node:
    """The copy that is waited for: of `fetch_wait` what its tensors are elements of."""
    launch = wait.args[1] if wait.target is OFFLOAD_WAIT else wait.all_input_nodes[0].args[0]
    assert isinstance(launch, fx.Node)
    return launch


def _host_bytes(node: fx.Node, rows: Rows) -> int:
    """That a copy to the host or from there moves."""
    moved = node if node.target is OFFLOAD else node.args[0]
    assert isinstance(moved, fx.Node)
    return tensor_bytes(moved.meta["host"], rows)


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


def kind_of(node: fx.Node) -> str:
    if node.target in MATMULS or node.target in CONVOLUTIONS:
        return "gemm"
    if node.target in _ATTENTION:
        return "attention"
    return "grouped_gemm" if node.target in _GROUPED else "memory"
