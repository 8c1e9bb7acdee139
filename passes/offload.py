"""Activation offload: what a layer saves for its backward is kept in host memory in between."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, fx

from omnicompile.capture.classify import is_free, is_fusible, is_in_place
from omnicompile.passes.liveness import balanced_rows, storage_of, storages_bytes
from omnicompile.passes.offload_op import FETCH, FETCH_WAIT, OFFLOAD, OFFLOAD_WAIT
from omnicompile.passes.segments import forward_layers, is_forward
from omnicompile.plan import BlockPlan

HOST_COPY = "host copy"  # node.meta["phase"] of what the pass puts in
_WAIT = torch.ops._c10d_functional.wait_tensor.default


@dataclass(frozen=True)
class Offloaded:
    """What a layer keeps in host memory: tensors and their bytes."""

    layer: str
    tensors: int
    nbytes: int


@dataclass
class _Layer:
    """saved: owner of a memory -> what the backward reads of it. end: index of the layer's last node in the forward.
    begin: of the first node of its backward that reads something saved. host: the launched copy."""

    name: str
    block: str
    end: int
    begin: int = 0
    saved: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    host: fx.Node | None = None


def offload_pass(gm: fx.GraphModule, blocks: Mapping[str, BlockPlan], parameters: Collection[str]) -> list[Offloaded]:
    """Change a step graph in place, for the layers of blocks whose plan says `offload`. parameters: placeholders.

    Before (layers 1, 2 and 3, each saving `a`):
        x1, a1 = f1(x0); x2, a2 = f2(x1); x3, a3 = f3(x2); ...; dx2 = df3(a3, dx3); dx1 = df2(a2, dx2); ...
    After:
        x1, a1 = f1(x0); A1 = offload(a1); x2, a2 = f2(x1); offload_wait(a1); A2 = offload(a2); x3, a3 = f3(x2);
        offload_wait(a2); ...; b2 = fetch(A2); dx2 = df3(a3, dx3); fetch_wait(b2); b1 = fetch(A1); dx1 = df2(b2, dx2);
        fetch_wait(b1); dx0 = df1(b1, dx1)

    - A layer's copies are launched when its forward is over and waited for when the next one's is, before that one's
      own are launched: beside the layer at work one layer at most is on its way.
    - They are fetched while the layer before it in the backward computes, and waited for where its own backward begins.
    - The layer whose backward comes first keeps its tensors: they would be fetched at once.
    - Launches and waits stand between kernels. Views that the backward reads are made again of what was fetched.

    What is saved is what recompute has left: memory made in the forward that something after it reads. It belongs to
    the layer that made it or, if only one other layer reads it, to that one (a layer's input). Kept on the device: what
    several layers or what lies outside of layers reads, parameters and what is made of them only, what something writes
    into, what the graph returns.

    Safe: a copy has the bits of what it is a copy of, and nothing else changes but the place of memory. Every rank runs
    the same graph, and there is no communication in it. Runs after everything that moves nodes.
    """
    if not any(block.offload for block in blocks.values()):
        return []
    return _Offload(gm, blocks, parameters).run()


class _Offload:
    def __init__(self, gm: fx.GraphModule, blocks: Mapping[str, BlockPlan], parameters: Collection[str]) -> None:
        self.gm, self.graph, self.blocks = gm, gm.graph, blocks
        self.nodes = list(gm.graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.layers = forward_layers(self.nodes)
        self.forward = self._before_the_turn()
        self.layer_of = {node: name for name, nodes in self.layers.items() for node in nodes}
        self.weights = _only_of(self.nodes, parameters)
        self.rows = balanced_rows(gm.graph)

    def run(self) -> list[Offloaded]:
        found = self._saved()
        backward = sorted(found, key=lambda layer: layer.begin)
        chosen = [layer for layer in backward[1:] if (plan := self.blocks.get(layer.block)) and plan.offload]
        forward = sorted(found, key=lambda layer: layer.end)
        for layer, following in pairwise(forward):
            if layer in chosen:
                self._out(layer, following)
        for earlier, layer in pairwise(backward):
            if layer.host is not None:
                self._back(layer, earlier)
        self.graph.eliminate_dead_code()
        self.graph.lint()
        self.gm.recompile()
        return [
            Offloaded(layer.name, len(layer.saved), storages_bytes(layer.saved, self.rows))
            for layer in forward
            if layer.host is not None
        ]

    # What is saved

    def _before_the_turn(self) -> set[fx.Node]:
        """Calls of the forward up to the loss: what only the backward reads may have been moved behind it."""
        (results,) = self.graph.output_node().args
        assert isinstance(results, tuple | list) and isinstance(results[0], fx.Node)
        turn = self.index[storage_of(results[0])]
        return {node for node in self.nodes[: turn + 1] if node.op == "call_function" and is_forward(node)}

    def _late(self, node: fx.Node) -> list[fx.Node]:
        """Users after the turn."""
        return [user for user in node.users if user not in self.forward and user in self.index]

    def _saved(self) -> list[_Layer]:
        """Layers that save anything."""
        kept = {storage_of(node) for node in self.nodes if is_in_place(node)} | self.weights
        kept |= {storage_of(node) for node in self.graph.output_node().all_input_nodes}
        found: dict[str, _Layer] = {}
        for owner, read in self._read_late().items():
            home = self._home(owner)
            if home and owner not in kept and _can_move(owner):
                layer = found.setdefault(home, self._layer(home))
                layer.saved[owner] = read
        for layer in found.values():
            layer.begin = min(self.index[user] for read in layer.saved.values() for n in read for user in self._late(n))
        return list(found.values())

    def _read_late(self) -> dict[fx.Node, list[fx.Node]]:
        """Owner of a memory made before the turn -> nodes in it that something after the turn reads."""
        found: dict[fx.Node, list[fx.Node]] = {}
        for node in self.nodes:
            if node in self.forward and self._late(node):
                owner = storage_of(node)
                if owner in self.forward:
                    found.setdefault(owner, []).append(node)
        return found

    def _home(self, owner: fx.Node) -> str:
        """The layer that a memory belongs to; "" for none."""
        maker, readers, stack = self.layer_of.get(owner, ""), set[str](), [owner]
        while stack:
            for user in stack.pop().users:
                if user in self.forward:
                    readers.add(self.layer_of.get(user, ""))
                    if storage_of(user) is owner:
                        stack.append(user)
        others = readers - {maker}
        return maker if not others else others.pop() if len(others) == 1 else ""

    def _layer(self, name: str) -> _Layer:
        nodes = self.layers[name]
        block = Counter(node.meta.get("block", "") for node in nodes).most_common(1)[0][0]
        return _Layer(name, block, max(self.index[n] for n in nodes if n in self.forward and n not in self.weights))

    # Copies

    def _out(self, layer: _Layer, following: _Layer) -> None:
        tensors = [_value(owner) for owner in layer.saved]
        layer.host = self._put(self._behind(layer.end), OFFLOAD, (tensors,), layer.block)
        layer.host.meta["val"] = None  # nothing on the device
        layer.host.meta["host"] = [tensor.meta["val"] for tensor in tensors]
        self._put(self._behind(following.end), OFFLOAD_WAIT, (tensors, layer.host), layer.block)

    def _put(
        self, before: fx.Node, target: torch._ops.OpOverload, arguments: tuple[object, ...], block: str
    ) -> fx.Node:
        """A call in front of `before`, behind what was put there already."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, arguments)
        node.meta = {"phase": HOST_COPY, "block": block}
        return node

    def _back(self, layer: _Layer, earlier: _Layer) -> None:
        assert layer.host is not None
        launch = self._put(self._in_front(earlier.begin), FETCH, (layer.host, torch.device("cpu")), layer.block)
        launch.meta["val"] = layer.host.meta["host"]
        copies: dict[fx.Node, fx.Node] = {}
        with self.graph.inserting_after(launch):
            for number, owner in reversed(list(enumerate(layer.saved))):
                item = self.graph.call_function(operator.getitem, (launch, number))
                item.meta = {"val": _value(owner).meta["val"], "phase": HOST_COPY, "block": layer.block}
                copies[_value(owner)] = item
        fetched = [copies[_value(owner)] for owner in layer.saved]
        self._put(self._in_front(layer.begin), FETCH_WAIT, (fetched,), layer.block)
        pairs = [(user, node) for read in layer.saved.values() for node in read for user in self._late(node)]
        for user, node in sorted(pairs, key=lambda pair: self.index[pair[0]]):
            user.replace_input_with(node, self._again(node, user, copies))

    def _behind(self, index: int) -> fx.Node:
        """The first node after `index` that is not part of the kernel there."""
        while not self._cuts(self.nodes[index + 1]):
            index += 1
        return self.nodes[index + 1]

    def _in_front(self, index: int) -> fx.Node:
        """The first node of the kernel that the node at `index` may be part of."""
        while not self._cuts(self.nodes[index - 1]):
            index -= 1
        return self.nodes[index]

    def _cuts(self, node: fx.Node) -> bool:
        """Whether no kernel reaches over `node`."""
        if node.op != "call_function":
            return True
        own = getattr(node.target, "namespace", "") not in ("aten", "prims")
        return not is_free(node) and (own or not is_fusible(node))

    def _again(self, node: fx.Node, before: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
        """What stands for `node` after the fetch: views are made again, right before they are first read."""
        if node not in copies:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            made = self._again(source, before, copies)
            with self.graph.inserting_before(before):
                copies[node] = self.graph.node_copy(node, lambda x: made if x is source else x)
            copies[node].meta = {**node.meta, "phase": HOST_COPY}
        return copies[node]


def _value(owner: fx.Node) -> fx.Node:
    """The node that has the values of a memory: of what a collective brings, its wait."""
    return next((user for user in owner.users if user.target is _WAIT), owner)


def _can_move(owner: fx.Node) -> bool:
    """Whether a copy of a memory is one tensor with the same strides."""
    value = _value(owner).meta.get("val")
    if not isinstance(value, Tensor) or sum(user.target is _WAIT for user in owner.users) > 1:
        return False
    if not all(isinstance(size, int) for size in value.shape):
        return True  # rows of experts, which operators make contiguous
    whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return whole and torch.empty_like(value).stride() == value.stride()


def _only_of(nodes: Iterable[fx.Node], parameters: Collection[str]) -> set[fx.Node]:
    """What is made of parameters only: gathered or cast ones, and views of them."""
    found: set[fx.Node] = set()
    for node in nodes:
        sources = node.all_input_nodes
        if node.op == "placeholder":
            if node.name in parameters:
                found.add(node)
        elif node.op == "call_function" and sources and all(source in found for source in sources):
            found.add(node)
    return found
