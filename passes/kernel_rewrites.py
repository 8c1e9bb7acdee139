"""Puts kernels in the place of what they compute: picked, or asked for by name (omnicompile/kernels)."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from omnicompile.kernels import grouped
from omnicompile.kernels.attention.call import Call, problem_on
from omnicompile.kernels.choice import KernelChoice
from omnicompile.kernels.layouts import heads_dim
from omnicompile.kernels.registry import INDUCTOR, Problem
from omnicompile.kernels.table import VARIANTS
from omnicompile.passes import kernel_patterns as patterns
from omnicompile.passes.chunked_loss import ROLE as CHUNKED_LOSS
from omnicompile.passes.kernel_patterns import CrossEntropy, LinearCrossEntropy, RmsNorm, Rope, Swiglu
from omnicompile.passes.propagate import module_of, schema_values
from omnicompile.passes.rank_program import RankProgram, axis_size
from omnicompile.passes.repeated_halves import repeats_halves
from omnicompile.plan import Layout, LossHead, Plan

aten, omni = torch.ops.aten, torch.ops.omnicompile


def rewrite_kernels_pass(program: RankProgram, plan: Plan | None = None) -> RankProgram:
    """Replace normalisation, gates, rotary embeddings and losses by one operator each, and name the implementation of
    attention and grouped products, as `program.kernels` picks.

    Before: `s = silu(g); y = mul(s, u)`; `o = attention(q, k, v, ...)`.
    After: `y = swiglu(g, u, "liger")`; `o = attention(q, k, v, ..., "flash_attn3")`.

    Safe because an operator has the value and the gradients of what it replaces, up to rounding, and goes over the
    ranks by the same cuts (rules/kernels.py). An operator whose pick is "inductor" stays as it is; nothing changes on
    CPUs unless it is asked for. Tables of rotary embeddings that depend on parameters are left alone, since they would
    need a gradient. Linear with cross-entropy is fused where the plan has a chunked loss head: its memory is that of
    the plan.
    """
    if program.kernels is None:
        return program
    chunked = (plan.loss_head if plan is not None else program.loss_head) is LossHead.CHUNKED
    rewriter = _Rewriter(program, program.kernels, chunked and not _gives_logits(program))
    rewriter.run()
    program.gm.graph.eliminate_dead_code()
    program.gm.graph.lint()
    program.gm.recompile()
    done = ", ".join(f"{count} {name}" for name, count in sorted(rewriter.done.items()))
    program.log.append(f"kernels: {done or 'nothing replaced'}")
    return program


def _gives_logits(program: RankProgram) -> bool:
    return any(node.meta["val"].dim() for node in program.output_nodes())


@dataclass
class _Rewriter:
    """chunked: the loss head may be fused. done: how many uses of an operator got which implementation."""

    program: RankProgram
    choice: KernelChoice
    chunked: bool
    done: Counter[str] = field(default_factory=Counter)

    def run(self) -> None:
        for node in list(self.program.gm.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target is omni.attention.default:
                self._name(node, self._attention_problem(node))
            elif node.target is omni.grouped_mm.default:
                self._name(node, self._grouped_problem(node))
            else:
                self._rewrite(node)

    def _problem(self, kind: str, x: Tensor, *shape: int) -> Problem:
        (variant,) = VARIANTS[kind]
        heads = x.shape[-1] if kind == "rope" else 0
        return Problem(kind, variant, self.choice.hardware, x.dtype, shape, heads)

    def _cuts(self, node: fx.Node) -> int:
        """Over how many ranks the tokens of a node are cut."""
        cut = self.program.block_of(node).layout in (Layout.SEQUENCE, Layout.IMAGES)
        return axis_size(self.program.mesh, "sp") if cut else 1

    # Anchors ---------------------------------------------------------------------------------------------------------

    def _name(self, node: fx.Node, problem: Problem) -> None:
        """Where nothing is asked for or measured, the operator itself takes the first that there is."""
        if self.choice.measurements is None and self.choice.asked(problem) is None:
            return
        kernel = self.choice.pick(problem, module_of(node))
        node.args, node.kwargs = tuple((schema_values(node) | {"implementation": kernel.name}).values()), {}
        self.done[f"{problem.operator} by {kernel.name}"] += 1

    def _attention_problem(self, node: fx.Node) -> Problem:
        """Of what one rank holds: its heads of whole sequences, or whole images."""
        values = schema_values(node)
        q, k, v = (_value(values[name]) for name in ("q", "k", "v"))
        cu_q, cu_k, sinks = (patterns.value_of(values[name]) for name in ("cu_q", "cu_k", "sinks"))
        call = Call(cu_q, cu_k, sinks, values["causal"], values["scale"], values["window"], values["softcap"])
        problem = problem_on(self.choice.hardware, q, k, v, call)
        batch, heads, queries, kv_heads, keys, *rest = problem.shape
        sp = self._cuts(node)
        if self.program.block_of(node).layout is Layout.IMAGES:
            return replace(problem, shape=(batch, heads, queries // sp, kv_heads, keys // sp, *rest))
        return replace(problem, shape=(batch, heads // sp, queries, math.lcm(kv_heads, sp) // sp, keys, *rest))

    def _grouped_problem(self, node: fx.Node) -> Problem:
        values = schema_values(node)
        experts, *matrix = _value(values["weight"]).shape
        mine = max(1, experts // self.program.mesh.ep)
        return grouped.problem_on(self.choice.hardware, _value(values["rows"]), (mine, *matrix))

    # Rewrites --------------------------------------------------------------------------------------------------------

    def _rewrite(self, node: fx.Node) -> None:
        if (norm := patterns.match_rms_norm(node)) is not None:
            self._rms_norm(norm)
        elif (gate := patterns.match_swiglu(node)) is not None:
            self._swiglu(gate)
        elif (turned := patterns.match_rope(node)) is not None:
            self._rope(turned)
        elif self.chunked and (head := patterns.match_linear_cross_entropy(node)) is not None:
            self._linear_cross_entropy(head)
        elif not self.chunked and (loss := patterns.match_cross_entropy(node)) is not None:
            self._cross_entropy(loss)

    def _put(
        self, problem: Problem, result: fx.Node, target: torch._ops.OpOverload, args: tuple[Any, ...]
    ) -> fx.Node | None:
        """The operator (its first output) in the place of `result`, unless the compiler is to do it."""
        kernel = self.choice.pick(problem, module_of(result))
        if kernel.name == INDUCTOR:
            return None
        self.done[f"{problem.operator} by {kernel.name}"] += 1
        graph = self.program.gm.graph
        with graph.inserting_before(result):
            call = new = _call(graph, target, (*args, kernel.name), result)
            if isinstance(call.meta["val"], tuple | list):
                new = _call(graph, operator.getitem, (call, 0), result)
            if new.meta["val"].dtype != result.meta["val"].dtype:
                new = _call(graph, aten.to.dtype, (new, result.meta["val"].dtype), result)
        result.replace_all_uses_with(new)
        return call

    def _rms_norm(self, found: RmsNorm) -> None:
        x = _value(found.input)
        rows = math.prod(x.shape[:-1]) // self._cuts(found.result)
        problem = self._problem("rms_norm", x, rows, x.shape[-1])
        args = found.input, found.weight, found.eps, found.offset, found.early_cast
        self._put(problem, found.result, omni.rms_norm.default, args)

    def _swiglu(self, found: Swiglu) -> None:
        x = _value(found.gate)
        rows = math.prod(x.shape[:-1]) // self._cuts(found.result)
        self._put(self._problem("swiglu", x, rows, x.shape[-1]), found.result, omni.swiglu.default,
                  (found.gate, found.up))  # fmt: skip

    def _rope(self, found: Rope) -> None:
        tables = found.cos, found.sin
        if any(self._trained(node) for node in ancestors(tables)):
            return
        x, table = _value(found.x), _value(found.cos)
        place = heads_dim(tuple(x.shape), tuple(table.shape))
        heads = 1 if place is None else x.shape[place]
        batch = x.shape[0] if x.dim() == 4 else 1
        length = math.prod(x.shape[:-1]) // (batch * heads) // self._cuts(found.result)
        problem = self._problem("rope", x, batch, heads, length, x.shape[-1])
        if self._may_replace(problem):
            facts = set() if place is not None and table.shape == _value(found.sin).shape else {"layout"}
            facts |= set() if all(repeats_halves(self.program.gm, node) for node in tables) else {"uneven_halves"}
            problem = replace(problem, facts=frozenset(facts))
        self._put(problem, found.result, omni.rope.default, (found.x, *tables))

    def _cross_entropy(self, found: CrossEntropy) -> None:
        logits = _value(found.logits)
        problem = self._problem("cross_entropy", logits, logits.shape[0] // self._cuts(found.result), logits.shape[1])
        args = found.logits, found.target, found.ignore
        self._put(problem, found.result, omni.cross_entropy.default, args)

    def _linear_cross_entropy(self, found: LinearCrossEntropy) -> None:
        """A frozen head is left to the chunked loss, which computes no gradient for it."""
        if not any(self._trained(node) for node in ancestors([found.weight])):
            return
        hidden, weight = _value(found.hidden), _value(found.weight)
        tokens = math.prod(hidden.shape[:-1]) // self._cuts(found.result)
        problem = self._problem("linear_cross_entropy", hidden, tokens, hidden.shape[-1], weight.shape[0])
        rows = found.hidden
        if hidden.dim() != 2:
            with self.program.gm.graph.inserting_before(found.result):
                flat = found.hidden, [-1, hidden.shape[-1]]
                rows = _call(self.program.gm.graph, aten.reshape.default, flat, found.result)
        args = rows, found.weight, found.target, found.ignore
        fused = self._put(problem, found.result, omni.linear_cross_entropy.default, args)
        if fused is not None:
            fused.meta["role"] = CHUNKED_LOSS

    def _trained(self, node: fx.Node) -> bool:
        spec = self.program.params.get(node.name)
        return spec is not None and spec.trainable

    def _may_replace(self, problem: Problem) -> bool:
        """Whether anything but the compiler can be picked."""
        return self.choice.measurements is not None or self.choice.asked(problem) not in (None, INDUCTOR)


def _call(graph: fx.Graph, target: Callable[..., Any], args: tuple[Any, ...], like: fx.Node) -> fx.Node:
    """A call with the metadata of `like`, but for its own value."""
    new = graph.call_function(target, args)
    new.meta = {**like.meta, "val": target(*fx.map_arg(args, lambda node: node.meta["val"]))}
    return new


def _value(node: object) -> Tensor:
    value = patterns.value_of(node)
    assert value is not None
    return value


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """With the nodes themselves."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return found
