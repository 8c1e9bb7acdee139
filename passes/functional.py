"""Changes in place become new values, so that every later pass sees a graph without side effects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from omnicompile.errors import LoweringError
from omnicompile.passes.propagate import module_of, operator_name, schema_values
from omnicompile.passes.rank_program import RankProgram
from omnicompile.plan import Plan

aten = torch.ops.aten
_ALWAYS_ALIAS = frozenset(
    [
        "slice",
        "select",
        "view",
        "transpose",
        "t",
        "unsqueeze",
        "squeeze",
        "permute",
        "detach",
        "alias",
        "expand",
        "narrow",
        "diagonal",
        "unfold",
    ]
)
# Views that may also copy: an alias only where the input is contiguous.
_MAYBE_ALIAS = frozenset(["reshape", "flatten", "unflatten", "contiguous", "_unsafe_view"])


def remove_mutation_pass(program: RankProgram, plan: Plan | None = None) -> RankProgram:
    """Write in-place operators out of place.

    Before: `v = x[.., :n]; copy_(v, y); z = f(x)`. After: `v = x[.., :n]; w = expand_as(y, v); x1 = slice_scatter(x,
    w, ..); z = f(x1)`. Later uses of the tensor, and of views of it, read the new value, as they did before.
    """
    removed = 0
    for node in list(program.gm.graph.nodes):
        if _mutates(node):
            _Mutation(program.gm.graph, node, _names(program)).remove()
            removed += 1
    if removed:
        program.gm.graph.lint()
        program.gm.recompile()
    program.log.append(f"in-place operators: {removed} written out of place")
    return program


def _mutates(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    arguments = node.target._schema.arguments
    info = arguments[0].alias_info if arguments else None
    return info is not None and info.is_write


def _names(program: RankProgram) -> dict[str, str]:
    kinds = {"buffer": "buffer", "input": "input", "host": "metadata of the batch"}
    found = {name: f"{kinds[spec.kind]} {spec.name}" for name, spec in program.inputs.items() if spec.kind in kinds}
    return found | {name: f"parameter {spec.name}" for name, spec in program.params.items()}


def _short(node: fx.Node) -> str:
    return operator_name(node).split("::")[-1]


def _parent(node: fx.Node) -> fx.Node | None:
    """The tensor that `node` is a view of, if any."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source, name = node.args[0], _short(node)
    value = source.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    if name in _ALWAYS_ALIAS or (name in _MAYBE_ALIAS and value.is_contiguous()):
        return source
    if name == "to" and value.dtype == node.meta["val"].dtype and not schema_values(node).get("copy"):
        return source
    return None


@dataclass
class _Mutation:
    """Takes one in-place operator out of a graph. names: what placeholders are, for messages."""

    graph: fx.Graph
    node: fx.Node
    names: Mapping[str, str]
    order: dict[fx.Node, int] = field(default_factory=dict)

    def remove(self) -> None:
        self.order = {n: i for i, n in enumerate(self.graph.nodes)}
        target = self.node.args[0]
        assert isinstance(target, fx.Node)
        with self.graph.inserting_before(self.node):
            new = self._value(target)
            renewed: dict[fx.Node, fx.Node] = {}
            base = self._write_back(target, new, renewed)
            self._renew_views(base, renewed)
        self.node.replace_all_uses_with(renewed[target])
        for old, fresh in renewed.items():
            old.replace_all_uses_with(fresh, delete_user_cb=self._later(fresh))
        self.graph.erase_node(self.node)

    def named(self, placeholder: fx.Node) -> str:
        return self.names.get(placeholder.name, "an input or constant")

    def _later(self, fresh: fx.Node) -> Callable[[fx.Node], bool]:
        limit = self.order[self.node]
        return lambda user: self.order.get(user, -1) > limit and user is not fresh

    def _emit(self, function: Any, args: tuple[Any, ...], like: fx.Node, value: Any = None) -> fx.Node:
        new = self.graph.call_function(function, args)
        new.meta = dict(self.node.meta)
        new.meta["val"] = like.meta["val"] if value is None else value
        return new

    def _value(self, target: fx.Node) -> fx.Node:
        """What the mutated tensor holds afterwards."""
        name, args = _short(self.node), self.node.args
        if name == "copy_" or (name == "fill_" and isinstance(args[1], fx.Node)):
            source = args[1]
            assert isinstance(source, fx.Node)
            wanted = target.meta["val"]
            if source.meta["val"].dtype != wanted.dtype:
                source = self._emit(aten.to.dtype, (source, wanted.dtype), source, source.meta["val"].to(wanted.dtype))
            return self._emit(aten.expand_as.default, (source, target), target)
        if name in ("fill_", "zero_"):
            value = args[1] if name == "fill_" else 0
            return self._emit(aten.full_like.default, (target, value), target)
        packet = getattr(aten, name.removesuffix("_"), None)
        overload = self.node.target._overloadname  # type: ignore[union-attr]
        if (name, overload) == ("bernoulli_", "float"):
            overload = "p"  # the only one that has another name out of place
        if packet is None or overload not in packet.overloads():
            raise LoweringError(
                f"{operator_name(self.node)} in {module_of(self.node)} changes a tensor in place: write it out of place"
            )
        new = self._emit(getattr(packet, overload), args, target)
        new.kwargs = dict(self.node.kwargs)
        return new

    def _write_back(self, target: fx.Node, new: fx.Node, renewed: dict[fx.Node, fx.Node]) -> fx.Node:
        """Carry the new value up the chain of views; returns the tensor at its end."""
        renewed[target] = new
        parent = _parent(target)
        while parent is not None:
            new = self._inverse(target, parent, new)
            renewed[parent] = new
            target, parent = parent, _parent(parent)
        if target.op != "call_function":
            raise LoweringError(
                f"{operator_name(self.node)} in {module_of(self.node)} changes {self.named(target)} in place, which "
                "ranks with other data would do differently: compute a new tensor, update it outside of the forward, "
                "or put the module in eval() if it is a norm that keeps statistics"
            )
        return target

    def _inverse(self, view: fx.Node, parent: fx.Node, new: fx.Node) -> fx.Node:
        name, values = _short(view), schema_values(view)
        if name == "slice":
            where = (values["dim"], values["start"], values["end"], values["step"])
            return self._emit(aten.slice_scatter.default, (parent, new, *where), parent)
        if name == "select":
            return self._emit(aten.select_scatter.default, (parent, new, values["dim"], values["index"]), parent)
        if name == "transpose" and "dim0" in values:
            return self._emit(aten.transpose.int, (new, values["dim0"], values["dim1"]), parent)
        if name in ("detach", "alias", "contiguous", "to"):
            return new
        if name in ("view", "unsqueeze", "squeeze", "reshape", "flatten", "unflatten", "_unsafe_view"):
            return self._emit(aten.reshape.default, (new, list(parent.meta["val"].shape)), parent)
        raise LoweringError(
            f"{operator_name(self.node)} in {module_of(self.node)} changes a view ({name}) in place: "
            "write it out of place"
        )

    def _renew_views(self, base: fx.Node, renewed: dict[fx.Node, fx.Node]) -> None:
        """Views taken before the change that are read after it, derived again."""
        limit = self.order[self.node]
        for view in [n for n in self.graph.nodes if self.order.get(n, limit) < limit]:
            if view in renewed or not any(self.order.get(u, -1) > limit for u in view.users):
                continue
            chain = [view]
            while (parent := _parent(chain[-1])) is not None:
                chain.append(parent)
            if chain[-1] is not base:
                continue
            for link in reversed(chain[:-1]):
                if link not in renewed:
                    source = link.args[0]
                    renewed[link] = self.graph.node_copy(link, lambda n, s=source: renewed[n] if n is s else n)  # type: ignore[misc]
