"""What the ranks hold of a node's value, and of the gradient that comes back to it, beside one process.

A value v of a group of SP ranks is whole on every rank, cut along a dimension, or the sum of what they hold. Under the
gradient convention (docs/passes.md) the ranks then hold summands of its gradient, the same pieces, or the whole. All
data ranks have the same micro-batch, so each of n holds 1/n of the gradient. What is computed from a mean loss may be
a data rank's share of it, and a mean loss itself a sum: then value and gradient have factors whose product is 1/n.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx

from omnicompile.errors import VerificationError
from omnicompile.passes import expert_ops
from omnicompile.passes.loss import is_mean_loss, is_sum_loss
from omnicompile.passes.propagate import module_of
from omnicompile.passes.rank_program import BATCH_AXES, RankProgram
from omnicompile.passes.simulate import RankRun

WHOLE, SUMMANDS = "whole", "summands"
_OF_GRADIENT = {WHOLE: SUMMANDS, SUMMANDS: WHOLE}  # of a value's gradient, by how the ranks hold the value
_OF_LOSSES = 1e-5  # of what is computed from losses, which are often float32 whatever the model
_LOOSE = 1e-4  # of gradients on the way, which are looked at only to say where a wrong one begins
_NOTHING = 1e-6  # of the largest gradient on the way: rounding


@dataclass(frozen=True)
class WholeRun:
    """The captured forward in one process. values, cotangents: what every node gave, and the gradients by that."""

    loss: float
    gradients: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    cotangents: Mapping[str, Tensor]


@dataclass(frozen=True)
class PlacementChecks:
    """Compares `got`, of the lowered program on all ranks, with `want`, node by node of the original graph.

    counts: targets of each mean loss on one data rank, in the order of the graph.
    """

    original: RankProgram
    lowered: RankProgram
    want: WholeRun
    got: RankRun
    counts: tuple[float, ...]
    tolerance: float

    @cached_property
    def _nodes(self) -> list[fx.Node]:
        """Those that both graphs have and whose rows every rank has in the order of the whole."""
        skipped = {node.name for node in _own_order(self.lowered.gm.graph)}
        graph = self.original.gm.graph
        names = self.want.values.keys() & self.got.values.keys() - skipped
        return [node for node in graph.nodes if node.op == "call_function" and node.name in names]

    @cached_property
    def _late(self) -> set[fx.Node]:
        """Losses, and what is computed from them."""
        return _followers(n for n in self.original.gm.graph.nodes if n.target is _CROSS_ENTROPY)

    @cached_property
    def _factors(self) -> dict[fx.Node, float]:
        """By which a data rank's values are multiples of one process's, where it is not 1."""
        means = [node for node in self.original.gm.graph.nodes if is_mean_loss(node)]
        sums = [node for node in self.original.gm.graph.nodes if is_sum_loss(node)]
        averaged = BATCH_AXES in self.lowered.groups  # means over data ranks are taken on the way to the loss
        share = 1.0 if averaged else 1.0 / self.lowered.mesh.data_ranks
        found = dict.fromkeys(_followers([*means, *sums]), share) | dict(zip(means, self.counts))
        found |= dict.fromkeys(sums, 1.0)
        return found | {node: found.get(node, 1.0) * self.lowered.mesh.sp for node in self._means_of_parts()}

    def _means_of_parts(self) -> list[fx.Node]:
        """Means over a dimension that is cut: each rank's is that of its part, and a product behind it, which a pass
        has put in, makes it a summand."""
        names = {node.name for node in self.original.gm.graph.nodes}
        share = torch.ops.aten.mul.Tensor, (1.0 / self.lowered.mesh.sp,)
        parts = set()
        for node in self.lowered.gm.graph.nodes:
            readers = [user for user in node.users if user.name not in names]
            if node.target in _MEANS and [(user.target, user.args[1:]) for user in readers] == [share]:
                parts.add(node.name)
        return [node for node in self.original.gm.graph.nodes if node.name in parts and node.target in _MEANS]

    def check_values(self) -> int:
        """Of everything before the losses. Returns how many; raises VerificationError naming the first wrong one."""
        early = [node for node in self._nodes if node not in self._late]
        for node in early:
            if wrong := self._wrong_value(node):
                raise VerificationError(wrong)
        return len(early)

    def wrong_loss(self) -> str:
        """Where a value that is computed from losses is first wrong; "" if nowhere."""
        return next((wrong for node in self._nodes if node in self._late and (wrong := self._wrong_value(node))), "")

    def wrong_gradient(self) -> str:
        """Where, on the way back from the loss, the gradients on the ranks are first wrong; "" if nowhere."""
        used = {node.name for node in _before(self.lowered.output_nodes()[0])}
        for node in reversed(self._nodes):
            if node.name in used and not self._is_right_gradient(node):
                readers = ", ".join(user.name for user in node.users)
                return f"between {node.name} in {module_of(node)} and what reads it ({readers})"
        return ""

    @property
    def _groups(self) -> range:
        """The first rank of every group of SP ranks."""
        return range(0, self.lowered.mesh.world, self.lowered.mesh.sp)

    def _held(self, node: fx.Node, start: int) -> set[str]:
        pieces = self.got.values[node.name][start : start + self.lowered.mesh.sp]
        tolerance = max(self.tolerance, _OF_LOSSES) if node in self._late else self.tolerance
        return relations(self.want.values[node.name] * self._factors.get(node, 1.0), pieces, tolerance)

    def _wrong_value(self, node: fx.Node) -> str:
        if all(self._held(node, start) for start in self._groups):
            return ""
        whole, pieces = self.want.values[node.name], self.got.values[node.name]
        shapes = ", ".join(str(tuple(piece.shape)) for piece in pieces[: min(2, self.lowered.mesh.sp)])
        summands = ", ".join(source.name for source in node.all_input_nodes if self._is_sum(source))
        return (
            f"{node.name} in {module_of(node)}: the ranks hold neither the whole value, nor pieces of it, nor "
            f"summands (whole {tuple(whole.shape)}; on ranks {shapes})"
            + (f"; of what it reads, they hold summands of {summands}" if summands else "")
        )

    def _is_sum(self, node: fx.Node) -> bool:
        return node in self._nodes and all(self._held(node, start) == {SUMMANDS} for start in self._groups)

    def _is_right_gradient(self, node: fx.Node) -> bool:
        """True too where nothing can be said of it."""
        if node.name not in self.want.cotangents or node.name not in self.got.cotangents:
            return True
        factor = self._factors.get(node, 1.0) * self.lowered.mesh.data_ranks
        whole, least = self.want.cotangents[node.name] / factor, self._rounding / factor
        for start in self._groups:
            pieces = self.got.cotangents[node.name][start : start + self.lowered.mesh.sp]
            found = relations(whole, pieces, max(self.tolerance, _LOOSE), least)
            held = {_OF_GRADIENT.get(relation, relation) for relation in self._held(node, start)}
            if held and not held & found:
                return False
        return True

    @cached_property
    def _rounding(self) -> float:
        """A gradient on the way that is smaller than this, is zero but for rounding."""
        return _NOTHING * max((float(g.norm()) for g in self.want.cotangents.values()), default=0.0)


_MEANS = (torch.ops.aten.mean.default, torch.ops.aten.mean.dim)
_CROSS_ENTROPY = torch.ops.aten.cross_entropy_loss.default


def _followers(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """With the nodes themselves."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found and node.op != "output":
            found.add(node)
            stack += node.users
    return found


def _before(node: fx.Node) -> set[fx.Node]:
    """What a node is computed from, and the node itself."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return found


def _own_order(graph: fx.Graph) -> set[fx.Node]:
    """Nodes between the dispatch and the combination of an expert layer, whose rows each rank has in its own order."""
    start = (expert_ops.dispatch, expert_ops.chunked_dispatch, torch.ops.omnicompile.expert_dispatch.default)
    end = (expert_ops.combine, expert_ops.chunked_combine, torch.ops.omnicompile.expert_combine.default)
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.target in start or (node.target not in end and any(n in found for n in node.all_input_nodes)):
            found.add(node)
    return found


def relation(whole: Tensor, pieces: Sequence[Tensor], tolerance: float) -> str:
    """How the ranks' pieces make up the whole: "whole", "summands", "cut along d", or "" if they do not."""
    found = relations(whole, pieces, tolerance)
    return WHOLE if WHOLE in found else min(found, default="")


def relations(whole: Tensor, pieces: Sequence[Tensor], tolerance: float, least: float = 1e-30) -> set[str]:
    """All that hold; more than one where the pieces are zeros or there is one rank. The norm of what differs is at most
    `tolerance` times that of the whole, or `least` if that is more."""
    if not whole.numel():
        return {WHOLE, SUMMANDS}
    if all(p.shape == whole.shape for p in pieces):
        same = all(_close(p, whole, tolerance, least) for p in pieces)
        total = torch.stack([p.double() for p in pieces]).sum(0)
        return ({WHOLE} if same else set()) | ({SUMMANDS} if _close(total, whole, tolerance, least) else set())
    if len({tuple(p.shape) for p in pieces}) > 1 or pieces[0].dim() != whole.dim():
        return set()
    return {
        f"cut along {dim}"
        for dim, (size, part) in enumerate(zip(whole.shape, pieces[0].shape))
        if size == part * len(pieces) and _is_cut(whole, pieces, dim, tolerance, least)
    }


def _is_cut(whole: Tensor, pieces: Sequence[Tensor], dim: int, tolerance: float, least: float) -> bool:
    """Also where the dimension is a flattened pair of which the second factor is cut."""
    part = pieces[0].shape[dim]
    for outer in (n for n in range(1, part + 1) if part % n == 0):
        folded = torch.cat([p.unflatten(dim, (outer, -1)) for p in pieces], dim + 1)
        if _close(folded.flatten(dim, dim + 1), whole, tolerance, least):
            return True
    return False


def _close(got: Tensor, want: Tensor, tolerance: float, least: float) -> bool:
    if got.shape != want.shape:
        return False
    finite = torch.isfinite(want)
    if not torch.equal(finite, torch.isfinite(got)):
        return False
    got, want = got.double()[finite], want.double()[finite]
    return bool((got - want).norm() <= tolerance * max(float(want.norm()), least) + 1e-30)
