"""Every choice of every placement rule, done: cut the inputs, run the operator on each rank's pieces, put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from omnicompile.passes.placement import PARTIAL, REPLICATE, Partial, Placement, Replicate, Shard
from omnicompile.passes.propagate import find_rule, operator_name, schema_values
from omnicompile.passes.rules.base import RANK, Choice, OpCall

RANKS = 2
aten = torch.ops.aten
anchors = torch.ops.omnicompile


@dataclass
class Example:
    """An operator on tensors (made anew from `tensors`) and other arguments, in order; `least`: choices it must
    have."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    least: int = 1

    def __str__(self) -> str:
        return f"{self.target}"


def r(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def ints(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape)


def pos(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64) + 0.5


ATTENTION = (None, None, None, 0, 0, True, 0.5, 0, 0.0)

EXAMPLES = [
    # element-wise
    Example(aten.add.Tensor, (r(2, 4, 6), r(4, 6))),
    Example(aten.mul.Tensor, (r(2, 4, 6), r(2, 4, 1))),
    Example(aten.div.Tensor, (r(2, 4), pos(2, 1))),
    Example(aten.sub.Tensor, (r(4, 6), r(4, 6))),
    Example(aten.silu.default, (r(4, 6),)),
    Example(aten.gelu.default, (r(4, 6),)),
    Example(aten.pow.Tensor_Scalar, (pos(4, 6), 2)),
    Example(aten.rsqrt.default, (pos(4, 6),)),
    Example(aten.where.self, (ints(2, 4, 1).bool(), r(4, 6), r(4, 6))),
    Example(aten.masked_fill.Scalar, (r(4, 6), ints(2, 4, 6).bool(), 0.0)),
    Example(aten.to.dtype, (r(4, 6), torch.float32)),
    Example(aten.clone.default, (r(4, 6),)),
    Example(aten.expand_as.default, (r(4, 1), r(4, 6))),
    Example(aten.dropout.default, (r(4, 6), 0.0, True)),
    Example(anchors.dropout.default, (r(2, 4, 6), torch.tensor(7), torch.tensor(1), None, 0.5, 1, 1), least=5),
    Example(anchors.uniform.default, (r(2, 4, 6), torch.tensor(7), None, None, 1, 1), least=5),
    Example(aten.cat.default, ([r(4, 2), r(4, 4)], -1)),
    Example(aten.stack.default, ([r(4, 2), r(4, 2)], 1)),
    # views
    Example(aten.view.default, (r(2, 4, 6), [8, 6])),
    Example(aten.view.default, (r(8, 6), [2, 4, 3, 2])),
    Example(aten.reshape.default, (r(2, 4, 6), [2, 4, 2, -1])),
    Example(aten.reshape.default, (r(8, 6), [-1, 12])),
    Example(aten.flatten.using_ints, (r(2, 4, 6), 0, 1)),
    Example(aten.unflatten.int, (r(8, 6), 0, [2, 4])),
    Example(aten.transpose.int, (r(2, 4, 6), 1, -1)),
    Example(aten.permute.default, (r(2, 4, 6), [2, 0, 1])),
    Example(aten.movedim.int, (r(2, 4, 6), 0, 2)),
    Example(aten.t.default, (r(4, 6),)),
    Example(aten.unsqueeze.default, (r(4, 6), 1)),
    Example(aten.squeeze.dim, (r(4, 1, 6), 1)),
    Example(aten.expand.default, (r(4, 1, 6), [4, 3, 6])),
    Example(aten.expand.default, (r(4, 6), [2, -1, -1])),
    Example(aten.repeat.default, (r(4, 6), [1, 2])),
    Example(aten.repeat_interleave.self_int, (r(4, 6), 3, 1)),
    Example(aten.slice.Tensor, (r(4, 6), 1, 2, 5)),
    Example(aten.slice.Tensor, (r(4, 6), 0, 0, 9223372036854775807)),
    Example(aten.split.Tensor, (r(4, 6), 3, 1)),
    Example(aten.split_with_sizes.default, (r(4, 6), [2, 4], 1)),
    Example(aten.chunk.default, (r(4, 6), 2, -1)),
    Example(aten.select.int, (r(4, 6, 2), 1, 3)),
    Example(aten.unbind.int, (r(4, 2, 6), 1)),
    Example(aten.roll.default, (r(4, 6), [1], [1])),
    Example(aten.pad.default, (r(4, 6), [1, 2])),
    # matrix products
    Example(aten.linear.default, (r(2, 4, 6), r(8, 6), r(8))),
    Example(aten.matmul.default, (r(2, 4, 6), r(2, 6, 8)), least=4),
    Example(aten.matmul.default, (r(2, 3, 4, 6), r(6, 8)), least=3),
    Example(aten.mm.default, (r(4, 6), r(6, 8)), least=3),
    Example(aten.bmm.default, (r(2, 4, 6), r(2, 6, 8)), least=3),
    Example(aten.addmm.default, (r(8), r(4, 6), r(6, 8))),
    Example(aten.embedding.default, (r(10, 4), ints(10, 2, 4)), least=2),
    Example(aten.einsum.default, ("bij,jk->bik", [r(2, 4, 6), r(6, 8)])),
    # along one dimension
    Example(aten.softmax.int, (r(4, 6), -1)),
    Example(aten.layer_norm.default, (r(2, 4, 6), [6], r(6), r(6))),
    Example(aten.rms_norm.default, (r(2, 4, 6), [6], r(6))),
    Example(aten.topk.default, (r(4, 6), 2)),
    Example(aten.sort.default, (r(4, 6), -1)),
    Example(aten.cumsum.default, (r(4, 6), 1)),
    Example(aten.one_hot.default, (ints(5, 4, 2), 5)),
    Example(aten.conv2d.default, (r(2, 3, 8, 8), r(4, 3, 2, 2), None, [2, 2]), least=3),
    Example(aten.conv2d.default, (r(2, 3, 8, 8), r(4, 3, 3, 3), None, [1, 1], [1, 1])),
    Example(aten.conv3d.default, (r(4, 3, 2, 4, 4), r(6, 3, 2, 4, 4), None, [2, 4, 4])),
    Example(aten.conv1d.default, (r(2, 4, 8), r(6, 4, 3), None, [1], [1])),
    # by index
    Example(aten.index.Tensor, (r(4, 6, 2), [ints(4, 8)])),
    Example(aten.index.Tensor, (r(2, 4, 6), [None, ints(4, 8)])),
    Example(aten.index.Tensor, (r(4, 4, 6), [ints(4, 8), ints(4, 8)])),
    Example(aten.index.Tensor, (r(4, 2, 6), [ints(4, 8), None, ints(6, 8)])),
    Example(aten.index_select.default, (r(4, 6), 0, ints(4, 8))),
    Example(aten.index_put.default, (r(4, 6), [torch.tensor([1, 3])], r(2, 6))),
    Example(aten.index_put.default, (r(2, 4, 6), [ints(1, 2, 4).bool() | True], r(8, 6))),
    Example(aten.gather.default, (r(4, 6), 1, ints(6, 4, 2))),
    Example(aten.scatter.src, (r(4, 6), 1, torch.arange(4).view(1, 4).expand(4, 4).contiguous(), r(4, 4))),
    Example(aten.scatter.value, (r(4, 6), 1, ints(6, 4, 2), 1.0)),
    Example(aten.scatter_add.default, (r(4, 6), 1, ints(6, 4, 2), r(4, 2))),
    Example(aten.index_add.default, (r(4, 6), 0, ints(4, 8), r(8, 6))),
    Example(aten.slice_scatter.default, (r(4, 6), r(4, 2), 1, 2, 4)),
    Example(aten.select_scatter.default, (r(4, 6, 2), r(4, 2), 1, 2)),
    Example(aten.masked_scatter.default, (r(2, 4, 6), ints(2, 2, 4, 1).bool(), r(8, 6))),
    # reductions and losses
    Example(aten.sum.dim_IntList, (r(4, 6), [0])),
    Example(aten.sum.default, (r(4, 6),)),
    Example(aten.mean.dim, (r(4, 6), [-1], True)),
    Example(aten.mean.dim, (r(2, 4, 6), [1])),
    Example(aten.amax.default, (r(4, 6), [1])),
    Example(aten.histc.default, (torch.randint(0, 4, (8,)).double(), 4, 0, 4)),
    Example(aten.cross_entropy_loss.default, (r(8, 5), ints(5, 8), None, 2)),
    Example(aten.cross_entropy_loss.default, (r(8, 5), ints(5, 8), None, 0)),
    Example(aten.mse_loss.default, (r(4, 6), r(4, 6), 1)),
    Example(aten.mse_loss.default, (r(4, 6), r(4, 6), 2)),
    # anchors
    Example(anchors.attention.default, (r(2, 4, 6, 8), r(2, 2, 6, 8), r(2, 2, 6, 4), *ATTENTION), least=2),
    Example(anchors.attention.default, (r(2, 4, 6, 8), r(2, 1, 6, 8), r(2, 1, 6, 4), *ATTENTION), least=2),
    Example(
        anchors.attention.default, (r(1, 4, 6, 8), r(1, 4, 6, 8), r(1, 4, 6, 8), torch.tensor([0, 2, 6]),
        torch.tensor([0, 2, 6]), r(4), 6, 6, True,
         0.5, 0, 0.0),
    ),
    Example(aten.scaled_dot_product_attention.default, (r(2, 4, 6, 8), r(2, 4, 6, 8), r(2, 4, 6, 8)), least=2),
    Example(aten.scaled_dot_product_attention.default, (r(2, 4, 6, 8), r(2, 4, 6, 8), r(2, 4, 6, 8), r(2, 1, 6, 6))),
]  # fmt: skip


def call_of(example: Example) -> tuple[fx.Node, dict[fx.Node, Tensor]]:
    """A graph of the one operator, and the values of its tensors."""
    graph, values = fx.Graph(), {}

    def place(value: Any) -> Any:
        if isinstance(value, Tensor):
            node = graph.placeholder(f"x{len(values)}")
            node.meta["val"], values[node] = value, value
            return node
        return [place(v) for v in value] if isinstance(value, list) else value

    args = tuple(place(a) for a in example.args)
    node = graph.call_function(example.target, args, {k: place(v) for k, v in example.kwargs.items()})
    node.meta["val"] = example.target(*example.args, **example.kwargs)
    return node, values


def cut(value: Tensor, placement: Placement) -> list[Tensor]:
    """What each rank holds."""
    if isinstance(placement, Replicate):
        return [value] * RANKS
    if isinstance(placement, Partial):
        part = torch.rand_like(value) if value.is_floating_point() else value // 2
        return [part, value - part]
    folded = value.unflatten(placement.dim, (placement.outer, -1))
    pieces = folded.chunk(RANKS, placement.dim + 1)
    return [piece.flatten(placement.dim, placement.dim + 1).contiguous() for piece in pieces]


def joined(pieces: list[Tensor], placement: Placement) -> Tensor:
    if isinstance(placement, Replicate):
        torch.testing.assert_close(pieces[0], pieces[1])
        return pieces[0]
    if isinstance(placement, Partial):
        return pieces[0] + pieces[1]
    folded = [piece.unflatten(placement.dim, (placement.outer, -1)) for piece in pieces]
    return torch.cat(folded, placement.dim + 1).flatten(placement.dim, placement.dim + 1)


def run_choice(call: OpCall, choice: Choice, values: dict[fx.Node, Tensor]) -> list[Any]:
    """The operator on every rank's pieces."""
    per_rank: list[dict[str, Any]] = [dict(call.values) for _ in range(RANKS)]
    for name, value in call.values.items():
        required = choice.inputs.get(name, REPLICATE)
        if isinstance(value, fx.Node):
            whole = values[value]
            if name in choice.prepare:
                function, extra = choice.prepare[name]
                whole = function(whole, *extra)
            assert not isinstance(required, tuple)
            for rank, piece in enumerate(cut(whole, required)):
                per_rank[rank][name] = piece
        elif isinstance(value, list) and any(isinstance(v, fx.Node) for v in value):
            wanted = list(required) if isinstance(required, tuple) else [required] * len(value)
            pieces = [cut(values[v], wanted.pop(0)) if isinstance(v, fx.Node) else [v] * RANKS for v in value]
            for rank in range(RANKS):
                per_rank[rank][name] = [p[rank] for p in pieces]
    results = []
    for rank, arguments in enumerate(per_rank):
        arguments.update({name: torch.tensor(rank) if v is RANK else v for name, v in choice.args.items()})
        schema = call.node.target._schema.arguments  # type: ignore[union-attr]
        result = call.node.target(  # type: ignore[operator]
            *(arguments[a.name] for a in schema if not a.kwarg_only),
            **{a.name: arguments[a.name] for a in schema if a.kwarg_only},
        )
        results.append(result * choice.scale if choice.scale != 1.0 else result)
    return results


def placements_to_try(values: dict[fx.Node, Tensor]) -> list[dict[fx.Node, Placement]]:
    """Every tensor cut along every dimension (also with an outer factor) or partial, the others whole."""
    tries: list[dict[fx.Node, Placement]] = [dict.fromkeys(values, REPLICATE)]
    for node, value in values.items():
        options: list[Placement] = []
        for dim, size in enumerate(value.shape):
            options += [Shard(dim, outer) for outer in (1, 2) if size % (RANKS * outer) == 0]
        if value.is_floating_point():
            options.append(PARTIAL)
        tries += [dict.fromkeys(values, REPLICATE) | {node: option} for option in options]
    tries += [dict.fromkeys(values, PARTIAL)]
    return tries


def check(example: Example) -> int:
    node, values = call_of(example)
    rule = find_rule(node)
    assert rule is not None, f"no rule for {operator_name(node)}"
    want = node.meta["val"]
    seen: list[Choice] = []
    for placements in placements_to_try(values):
        call = OpCall(node, operator_name(node).split("::")[-1], schema_values(node), placements, RANKS)
        for choice in rule(call):
            if choice in seen:
                continue
            seen.append(choice)
            results = run_choice(call, choice, values)
            multiple = isinstance(want, tuple | list)
            for number, expected in enumerate(want if multiple else [want]):
                placement = choice.outputs[number] if len(choice.outputs) > 1 else choice.outputs[0]
                got = joined([x[number] if multiple else x for x in results], placement)
                torch.testing.assert_close(got, expected, msg=lambda m, c=choice: f"{c}\n{m}")
    return len(seen)


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_every_choice_gives_the_whole_result(example: Example) -> None:
    torch.manual_seed(0)
    assert check(example) >= example.least


def test_a_wrong_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's own test: a mean over a cut dimension without its scale does not pass."""

    def wrong(call: OpCall) -> list[Choice]:
        return [Choice({"self": Shard(0)}, (PARTIAL,))]

    patched: dict[str, Callable[[OpCall], list[Choice]]] = {"aten::mean": wrong}
    monkeypatch.setattr("omnicompile.passes.propagate.RULES", patched)
    with pytest.raises(AssertionError):
        check(Example(aten.mean.default, (r(4, 6),)))
