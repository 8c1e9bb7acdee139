"""The backward of a segment with the forward calls that a recompute policy runs again in it.

    forward:  a = f(x); b = g(a); c = h(b)           backward:  db = dh(b, dc); da = dg(a, db)
    kept x:   a2 = f(x); b2 = g(a2); db = dh(b2, dc); da = dg(a2, db)

A call that runs again stands right before the first one that reads it, as the runtime has it (passes/recompute.py), and
so does what the backward makes of the forward's results alone.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from omnicompile.capture.classify import storage_of
from omnicompile.capture.joint import JointGraph


def rerun(joint: JointGraph, again: Collection[fx.Node]) -> tuple[dict[fx.Node, fx.Node], list[fx.Node]]:
    """again: forward calls that run again; everything else that the backward reads is kept. Returns (node of the new
    graph -> node of the joint graph that it is a copy of, the new graph's calls in order)."""
    return _Builder(joint, again).build()


class _Builder:
    def __init__(self, joint: JointGraph, again: Collection[fx.Node]) -> None:
        self._joint, self._again, self._backward = joint, set(again) | _of_forward_alone(joint), set(joint.backward)
        self._order = {node: index for index, node in enumerate(joint.graph.nodes)}
        self._graph = fx.Graph()
        self._made: dict[fx.Node, fx.Node] = {}
        self._origin: dict[fx.Node, fx.Node] = {}
        self._calls: list[fx.Node] = []

    def build(self) -> tuple[dict[fx.Node, fx.Node], list[fx.Node]]:
        for node in [n for n in self._joint.backward if n not in self._again] + self._joint.backward:
            for source in sorted(self._missing(node), key=self._order.__getitem__):
                self._copy(source)
        results = (*self._joint.weight_grads.values(), *self._joint.input_grads)
        self._graph.output([self._made[node] for node in results if node in self._made])
        return self._origin, self._calls

    def _missing(self, call: fx.Node) -> set[fx.Node]:
        """`call` and what it comes from, as far as that is not there yet."""
        found: set[fx.Node] = set()
        stack = [call]
        while stack:
            node = stack.pop()
            if node in self._made or node in found:
                continue
            found.add(node)
            if node is call or self._runs(node):
                stack.extend(node.all_input_nodes)
        return found

    def _runs(self, node: fx.Node) -> bool:
        """Whether it is run again, or a view of something; else it is there from the forward."""
        return node in self._again or storage_of(node) is not node

    def _copy(self, node: fx.Node) -> None:
        if node in self._backward or self._runs(node):
            copy = self._graph.node_copy(node, self._made.__getitem__)
            self._calls.append(copy)
        else:
            copy = self._graph.placeholder(node.name)
            copy.meta = node.meta
        self._made[node] = copy
        self._origin[copy] = node


def _of_forward_alone(joint: JointGraph) -> set[fx.Node]:
    """Calls of the backward that depend on no gradient."""
    gradients = set(joint.tangents)
    for node in joint.backward:
        if any(source in gradients for source in node.all_input_nodes):
            gradients.add(node)
    return set(joint.backward) - gradients
