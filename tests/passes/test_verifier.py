"""The verifier accepts what the passes make and names what is broken in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx

from omnicompile.errors import VerificationError
from omnicompile.passes import collectives, lower_forward
from omnicompile.passes.placement_checks import relation
from omnicompile.passes.propagate import module_of
from omnicompile.passes.rank_program import RankProgram
from omnicompile.passes.verifier import check_gradient_axes, verify_lowering
from omnicompile.plan import Mesh

from .models import block_plans, mixture_model, text_batch
from .parity import captured_for, program_of, shifted_targets, whole_values

MESH = Mesh(dp_shard=2, sp=2, ep=2)


@pytest.fixture(scope="module")
def case() -> tuple[RankProgram, dict[str, Tensor], int]:
    model, batch = mixture_model(layers=1, aux=True), text_batch(0, length=16)
    captured, inputs = captured_for(model, batch)
    program = program_of(captured, model, MESH, block_plans(MESH), 16)
    values = whole_values(program, captured, model) | inputs.prepare(batch)
    return program, values, shifted_targets(batch)


def _calls(program: RankProgram, function: Callable[..., object]) -> list[fx.Node]:
    return [node for node in program.gm.graph.nodes if node.target is function]


def _drop(program: RankProgram, node: fx.Node) -> None:
    """Let what reads `node` read its input."""
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    program.gm.graph.erase_node(node)
    program.gm.recompile()


def halved_gradient(x: Tensor) -> Tensor:
    return x * 0.5 + x.detach() * 0.5


def test_accepts_a_right_program(case: tuple[RankProgram, dict[str, Tensor], int]) -> None:
    program, values, targets = case
    report = verify_lowering(program, lower_forward(program), values, targets)
    assert report.nodes > 80 and report.worst[1] < 1e-5


def test_finds_a_dropped_all_reduce_where_a_partial_value_meets_a_product(
    case: tuple[RankProgram, dict[str, Tensor], int],
) -> None:
    program, values, targets = case
    broken = lower_forward(program)
    reductions = [n for n in _calls(broken, collectives.all_reduce) if n.meta["role"] == "sp_all_reduce"]
    assert reductions
    _drop(broken, reductions[-1])
    total = program.output_nodes()[0]  # adds summands as if they were whole
    with pytest.raises(VerificationError) as caught:
        verify_lowering(program, broken, values, targets)
    assert str(caught.value).startswith(
        f"{total.name} in {module_of(total)}: the ranks hold neither the whole value, nor pieces of it, nor summands "
        "(whole (); on ranks (), ()); of what it reads, they hold summands of "
    )


def test_finds_a_scaled_gradient(case: tuple[RankProgram, dict[str, Tensor], int]) -> None:
    program, values, targets = case
    broken = lower_forward(program)
    exchange = _calls(broken, collectives.all_to_all)[0]
    with broken.gm.graph.inserting_after(exchange):
        scaled = broken.gm.graph.call_function(halved_gradient, (exchange,))
    exchange.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
    broken.gm.recompile()
    source = exchange.args[0]
    assert isinstance(source, fx.Node)
    where = rf"gradient of .* is off .* scaled between {source.name} in .* and what reads it"
    with pytest.raises(VerificationError, match=where):
        verify_lowering(program, broken, values, targets)


def test_finds_a_cut_along_the_wrong_dimension(case: tuple[RankProgram, dict[str, Tensor], int]) -> None:
    program, values, targets = case
    broken = lower_forward(program)
    exchange = _calls(broken, collectives.all_to_all)[0]
    x, split, split_outer, _, join_outer, ranks, group = exchange.args
    exchange.args = (x, split, split_outer, 3, join_outer, ranks, group)
    broken.gm.recompile()
    with pytest.raises(VerificationError):
        verify_lowering(program, broken, values, targets)


def test_finds_a_parameter_gathered_along_the_wrong_dimension(case: tuple[RankProgram, dict[str, Tensor], int]) -> None:
    program, values, targets = case
    broken = lower_forward(program)
    gather = next(n for n in _calls(broken, collectives.gather_param) if n.meta["val"].dim() == 2)
    gather.args = (gather.args[0], 1, *gather.args[2:])
    broken.gm.recompile()
    with pytest.raises(VerificationError):
        verify_lowering(program, broken, values, targets)


def test_finds_gradients_reduced_over_the_wrong_ranks(case: tuple[RankProgram, dict[str, Tensor], int]) -> None:
    program, _, _ = case
    broken = lower_forward(program)
    for gather in _calls(broken, collectives.gather_param):
        gather.args = (*gather.args[:-1], broken.group("dp_shard,sp"))
    with pytest.raises(VerificationError, match="gathered over"):
        check_gradient_axes(broken)
    missing = lower_forward(program)
    name, spec = next((n, s) for n, s in missing.params.items() if len(s.shards) == 2)
    missing.params[name] = replace(spec, shards=spec.shards[:1])
    with pytest.raises(VerificationError):
        check_gradient_axes(missing)
    twice = lower_forward(program)
    name, spec = next(iter(twice.params.items()))
    twice.params[name] = replace(spec, reduce_axes=("dp_shard",))
    with pytest.raises(VerificationError, match="each once"):
        check_gradient_axes(twice)


def test_relations() -> None:
    x = torch.randn(4, 6)
    assert relation(x, [x, x], 1e-6) == "whole"
    assert relation(x, [x[:, :3], x[:, 3:]], 1e-6) == "cut along 1"
    assert relation(x, [x[[0, 2]], x[[1, 3]]], 1e-6) == "cut along 0"
    assert relation(x, [x * 0.25, x * 0.75], 1e-6) == "summands"
    assert relation(x, [x, 2 * x], 1e-6) == ""
    assert relation(x, [x[:2], x[:2]], 1e-6) == ""
