"""Chains whose exchanges run beside compute."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[1] / "planner"))

import synthetic

from omnicompile.cluster import Cluster
from omnicompile.cost_model import timeline
from omnicompile.cost_model.step_chain import Chain, merge
from omnicompile.cost_model.step_layout import block_groups, block_split
from omnicompile.cost_model.step_model import StepModel
from omnicompile.cost_model.step_numbers import ProgramNumbers
from omnicompile.cost_model.step_overlap import check_chain, makespan, renumbered
from omnicompile.cost_model.step_price import Piece, Prices
from omnicompile.cost_model.step_rows import SORT_KERNELS, with_row_moves
from omnicompile.cost_model.step_schedule import build_step
from omnicompile.cost_model.step_units import UnitWork
from omnicompile.plan import BlockPlan, Layout, LossHead, Mesh, Overlap, Plan
from omnicompile.program import Phase, Program, Recompute, Sym
from omnicompile.workload import Workload

CLUSTER = Cluster(16)


def make_plan(program: Program, mesh: Mesh, overlap: Overlap, recompute: Recompute = Recompute.NONE) -> Plan:
    layout = Layout.BATCH if mesh.sp == 1 else Layout.SEQUENCE
    block = BlockPlan(layout=layout, sp=mesh.sp, ep=mesh.ep, recompute=recompute)
    blocks = {b.name: block for b in program.blocks}
    return Plan("m", CLUSTER, Workload(program.sample.seq_len), mesh, blocks, 1, 1, LossHead.FULL, overlap=overlap)


def layer(program: Program, plan: Plan) -> UnitWork:
    return StepModel(program, CLUSTER).plan_blocks(plan)["text"].work.units["text.layers"]


def seconds(chain: Chain, stream: str = "compute") -> float:
    return sum(piece.seconds for piece in chain if piece.stream == stream)


def chains(unit: UnitWork) -> dict[str, Chain]:
    return {"forward": unit.forward, "again": unit.again, "backward": unit.backward}


PROGRAMS = [(synthetic.dense_lm, Mesh(dp_shard=4, sp=4)), (synthetic.moe_lm, Mesh(dp_shard=4, sp=4, ep=8))]


@pytest.mark.parametrize(("program", "mesh"), PROGRAMS)
@pytest.mark.parametrize("recompute", list(Recompute))
def test_the_same_work_in_less_time(program: object, mesh: Mesh, recompute: Recompute) -> None:
    made = program()  # type: ignore[operator]
    early = layer(made, make_plan(made, mesh, Overlap(), recompute))
    late = layer(made, make_plan(made, mesh, Overlap(exchanges=False), recompute))
    for name, chain in chains(early).items():
        check_chain(chain)
        plain = chains(late)[name]
        assert not any(piece.launch for piece in plain)
        assert seconds(chain) == pytest.approx(seconds(plain))
        assert seconds(chain, "intra") == pytest.approx(seconds(plain, "intra"))
        assert max(seconds(chain), seconds(chain, "intra")) <= makespan(chain) <= makespan(plain) + 1e-12
    assert makespan(early.forward) < makespan(late.forward)
    assert makespan(early.backward) < makespan(late.backward)


def test_q_travels_while_k_and_v_are_made() -> None:
    program = synthetic.dense_lm()
    chain = layer(program, make_plan(program, Mesh(dp_shard=4, sp=4), Overlap())).forward
    shape = [f"{piece.stream} {piece.launch or '-'}" for piece in chain]
    assert shape == [
        "compute -", "intra 1", "compute -", "intra 2", "compute -", "intra 3", "compute -", "intra 4", "compute -"
    ]  # fmt: skip
    assert chain[6].after == (1, 2, 3) and chain[8].after == (4,)


def fused(kv_heads: int, is_fused: bool) -> Program:
    stack = synthetic.Stack("text", 4, 1024, 16, kv_heads, 4096, Sym.S, Sym.S2, causal=True, fused=is_fused)
    return synthetic.language_model(stack, 1000, 8192)


@pytest.mark.parametrize("kv_heads", [4, 16])
def test_a_fused_product_counts_as_three(kv_heads: int) -> None:
    one, three = fused(kv_heads, True), fused(kv_heads, False)
    mesh = Mesh(dp_shard=4, sp=4)
    found = {name: layer(p, make_plan(p, mesh, Overlap())) for name, p in (("one", one), ("three", three))}
    late = layer(one, make_plan(one, mesh, Overlap(exchanges=False)))
    for name, chain in chains(found["one"]).items():
        check_chain(chain)
        if not chain:
            continue
        other = chains(found["three"])[name]
        shapes = [[(piece.stream, piece.launch, piece.after) for piece in c] for c in (chain, other)]
        assert shapes[0] == shapes[1]
        assert makespan(chain) == pytest.approx(makespan(other), rel=0.05)
        assert makespan(chain) < makespan(chains(late)[name])


def test_weight_gradients_fill_the_time_of_an_exchange() -> None:
    """With a slow network the products before the exchange of attention's result come after its launch."""
    program = synthetic.dense_lm()
    plan = make_plan(program, Mesh(dp_shard=4, sp=4), Overlap())
    model = StepModel(program, CLUSTER)
    link = replace(model.hardware.intra_link, bytes_per_second=model.hardware.intra_link.bytes_per_second / 50)
    slow = StepModel(program, CLUSTER, replace(model.hardware, intra_link=link))
    beside = {}
    for name, found in (("fast", model), ("slow", slow)):
        chain = found.plan_blocks(plan)["text"].work.units["text.layers"].backward
        check_chain(chain)
        launched = next(i for i, piece in enumerate(chain) if piece.launch)
        waited = next(i for i, piece in enumerate(chain) if chain[launched].launch in piece.after)
        beside[name] = seconds(chain[launched:waited])
    assert beside["slow"] > 2 * beside["fast"] > 0


def test_a_plan_is_never_slower_for_it() -> None:
    for program, mesh in PROGRAMS:
        made = program()
        times = [
            timeline.simulate(build_step(made, make_plan(made, mesh, overlap), StepModel(made, CLUSTER)).last)
            for overlap in (Overlap(exchanges=False), Overlap())
        ]
        assert times[1].seconds <= times[0].seconds
        assert times[1].exposed["all_to_all"] < times[0].exposed["all_to_all"]


def test_makespan_of_a_chain_with_a_launch() -> None:
    launch = Piece("intra", 3.0, "all_to_all", launch=1)
    chain = (Piece("compute", 1.0, "compute"), launch, Piece("compute", 2.0, "compute"))
    assert makespan((*chain, Piece("compute", 1.0, "compute", after=(1,)))) == 5.0
    assert makespan((*chain, Piece("intra", 1.0, "all_to_all"))) == 5.0  # one channel
    with pytest.raises(ValueError, match="never waited"):
        check_chain(chain)
    with pytest.raises(ValueError, match="not been launched"):
        check_chain((Piece("compute", 1.0, "compute", after=(1,)),))


_times = st.floats(0.0, 10.0)
_pieces = st.lists(st.tuples(st.sampled_from(["compute", "launch", "wait"]), _times), max_size=12)


def _chain(entries: list[tuple[str, float]]) -> Chain:
    pieces: list[Piece] = []
    open_launches: list[int] = []
    for number, (what, length) in enumerate(entries, start=1):
        if what == "launch":
            pieces.append(Piece("intra", length, "all_to_all", launch=number))
            open_launches.append(number)
        else:
            after = (open_launches.pop(0),) if what == "wait" and open_launches else ()
            pieces.append(Piece("compute", length, "compute", after=after))
    return (*pieces, Piece("compute", 0.0, "compute", after=tuple(open_launches)))


@given(_pieces, _pieces)
def test_merging_changes_no_time_and_chains_add_up(
    first: list[tuple[str, float]], second: list[tuple[str, float]]
) -> None:
    one, two = _chain(first), _chain(second)
    assert makespan(merge(one)) == pytest.approx(makespan(one))
    both = (*one, *renumbered(two, len(one) + 1))
    check_chain(both)
    assert makespan(both) == pytest.approx(makespan(one) + makespan(two))


@pytest.mark.parametrize(
    "mesh, chunks, moves",
    [
        (Mesh(dp_shard=4, sp=4), 1, 0),
        (Mesh(dp_shard=4, sp=4, ep=8), 1, 2),
        (Mesh(dp_shard=4, sp=4, ep=8), 4, 3),
        (Mesh(dp_shard=32, sp=4, ep=128), 1, 0),
    ],
)
@pytest.mark.parametrize("phase", list(Phase))
def test_rows_of_experts_are_moved_where_they_arrive(mesh: Mesh, chunks: int, moves: int, phase: Phase) -> None:
    """There and back, and once more to put chunks together; not where a rank holds one expert."""
    program, model = synthetic.moe_lm(), StepModel(synthetic.moe_lm(), CLUSTER)
    prices = Prices(model.hardware)
    block = make_plan(program, mesh, Overlap()).blocks["text"]
    ops = [op for op in ProgramNumbers(program).at(1).segments["text.layers"].ops if op.op.phase is phase]
    split, groups = block_split(block, mesh, 0), block_groups(mesh, block, 8)
    times = with_row_moves(ops, [0.0] * len(ops), split, groups, prices, chunks)
    move = prices.memory(2 * program.sample.seq_len * 8 * 2048 * 2 / mesh.sp)  # rows of 8 experts a token
    finding = chunks * SORT_KERNELS * prices.memory(1.0) if phase is Phase.FORWARD and moves else 0.0
    assert sum(times) == pytest.approx(moves * move + finding)
    experts = [i for i, op in enumerate(ops) if op.op.experts is not None]
    assert all(time == 0 for time in times[: experts[0]])


def test_experts_in_pieces_of_matrices_are_put_into_place() -> None:
    """128 experts on 32 ranks lie together in memory; on 256, pieces of each are stored by two."""
    program = synthetic.moe_lm()
    weights = {}
    for ranks in (32, 256):
        plan = make_plan(program, Mesh(dp_shard=ranks), Overlap())
        weights[ranks] = StepModel(program, Cluster(ranks)).plan_blocks(plan)["text"].weights.units["text.layers"]
    expert = 128 * 3 * 2048 * 768 * 2  # bytes in compute precision
    assert weights[256].cast > Prices(StepModel(program, CLUSTER).hardware).memory(2 * expert) > weights[32].cast
