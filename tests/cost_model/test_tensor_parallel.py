"""Where tensor parallelism cuts a layer, what it exchanges, and what other stacks' ways cost."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "planner"))

import synthetic

from omnicompile.cluster import Cluster
from omnicompile.cost_model import tensor_parallel
from omnicompile.cost_model.collectives import collective_seconds
from omnicompile.cost_model.hardware import load_hardware
from omnicompile.cost_model.step_layout import Split, block_groups
from omnicompile.cost_model.step_model import StepModel
from omnicompile.cost_model.step_numbers import ProgramNumbers, SegmentNumbers
from omnicompile.cost_model.step_price import Prices, gemm_sizes
from omnicompile.cost_model.tensor_parallel import Cut
from omnicompile.errors import PlanError
from omnicompile.plan import BlockPlan, Mesh, Prediction
from omnicompile.planner.given import given_plan
from omnicompile.planner.predict import simulate
from omnicompile.program import OpKind, Phase, Program
from omnicompile.workload import Workload


def layer_of(program: Program) -> SegmentNumbers:
    name = next(s.name for s in program.segments if s.role == "layer")
    return ProgramNumbers(program).at(1).segments[name]


def priced(program: Program, layout: dict[str, str], gpus: int = 16) -> Prediction:
    cluster = Cluster(gpus)
    plan = given_plan(program, cluster, Workload(program.sample.seq_len, global_batch=16), layout)
    found = simulate(program, plan, StepModel(program, cluster)).prediction
    assert found is not None
    return found


def test_a_layer_is_entered_and_left_twice() -> None:
    layer = layer_of(synthetic.dense_lm())
    found = tensor_parallel.roles(layer)
    cuts = {op.op.name: role.cut for op, role in zip(layer.ops, found)}
    forward = [role.cut for op, role in zip(layer.ops, found) if op.op.phase is Phase.FORWARD and op.op.gemm]
    assert forward.count(Cut.ROW) == tensor_parallel.sublayers(layer) == 2
    assert forward[-1] is Cut.ROW and forward[0] is Cut.COLUMN
    for name, cut in cuts.items():  # what a product enters in the forward, its input gradient leaves in the backward
        if f"{name}.dx" in cuts:
            assert cuts[f"{name}.dx"] is cut and cuts[f"{name}.dw"] is Cut.WEIGHT


def test_matrix_products_divide_evenly() -> None:
    layer = layer_of(synthetic.dense_lm())
    width = tensor_parallel.stream_width(layer)
    for op, role in zip(layer.ops, tensor_parallel.roles(layer)):
        if op.op.kind is OpKind.GEMM:
            m, n, k = gemm_sizes(op, Split(tensor=4), role.inner, width)
            assert m * n * k == pytest.approx(op.m * op.n * op.k / 4)
            assert (m, n, k)[2 if op.op.token_dim == "k" else 0] in (op.m, op.k)  # tokens stay whole


@pytest.mark.parametrize(("sequence", "kinds"), [(True, ["all_gather", "reduce_scatter"]), (False, ["all_reduce"])])
def test_collectives_around_the_split_parts(sequence: bool, kinds: list[str]) -> None:
    layer = layer_of(synthetic.dense_lm())
    ops = [op for op in layer.ops if op.op.phase is Phase.FORWARD]
    roles = tensor_parallel.roles(layer)[: len(ops)]
    groups = block_groups(Mesh(tp=8), BlockPlan(), 8)
    split = Split(tensor=8, tensor_sequence=sequence)
    prices = Prices(load_hardware("h100"))
    width = tensor_parallel.stream_width(layer)
    found = tensor_parallel.exchanges(ops, roles, [1e-3] * len(ops), split, groups, prices, width)
    issued = [piece for around in found.values() for piece in (*around.before, *around.after)]
    assert sorted(piece.kind for piece in issued) == sorted(kinds * 2)
    nbytes = ops[1].m * width * 2
    assert issued[-1] == prices.collective(kinds[-1], nbytes, groups.tensor)[0]


def test_pipelined_collectives_leave_a_part_of_themselves() -> None:
    program = synthetic.dense_lm()
    plain, beside = (priced(program, {"tp": "8", "tp_overlap": flag}) for flag in ("false", "true"))
    assert beside.step_seconds < plain.step_seconds


def test_activations_and_parameters_divide() -> None:
    program = synthetic.dense_lm()
    layout = {"sharding": "zero1", "micro_batch": "1"}
    whole, split = priced(program, layout), priced(program, layout | {"tp": "4"})
    assert split.memory["parameters"] < 0.4 * whole.memory["parameters"]
    assert split.memory["activations"] == pytest.approx(whole.memory["activations"] / 4)
    uncut = priced(program, layout | {"tp": "4", "tp_sequence": "false"})
    assert split.memory["activations"] < uncut.memory["activations"] < whole.memory["activations"]


def test_zero1_keeps_parameters_whole_and_shards_the_rest() -> None:
    program = synthetic.dense_lm()
    zero, whole = priced(program, {"sharding": "zero1"}), priced(program, {"sharding": "replicate"})
    assert zero.memory["optimizer"] == pytest.approx(whole.memory["optimizer"] / 16)
    assert zero.memory["parameters"] == pytest.approx(program.param_count * (2 + 4 / 16))
    overlapped = priced(program, {"sharding": "zero1", "overlap_gradients": "true"})
    assert overlapped.step_seconds < zero.step_seconds
    assert overlapped.time["hidden reduce_scatter"] > 0


def test_a_ring_divides_attention_and_hides_behind_it() -> None:
    program = synthetic.dense_lm()
    one, two = priced(program, {"sharding": "zero1"}), priced(program, {"sharding": "zero1", "cp": "2"})
    assert two.memory["activations"] == pytest.approx(one.memory["activations"] / 2)
    assert two.step_seconds == pytest.approx(one.step_seconds, rel=0.2)  # half the ranks share each of the samples


def test_a_ring_over_nodes_takes_the_network() -> None:
    hw = load_hardware("h100")
    inside, across = (collective_seconds("send_recv", 3e7, ranks, 8, hw) for ranks in (8, 16))
    assert across > 5 * inside
    program = synthetic.dense_lm(131072)
    wide = priced(program, {"sharding": "zero1", "cp": "16"})
    assert wide.time["exposed send_recv"] > 0


def test_nothing_to_look_at_costs_nothing() -> None:
    program = synthetic.vision_language_7b()
    blind = replace(program, sample=replace(program.sample, images=0))
    assert priced(blind, {"tp": "2", "sharding": "zero1"}).step_seconds > 0
    assert priced(blind, {}).step_seconds < priced(program, {}).step_seconds


def test_a_router_stays_whole_and_shared_experts_exchange() -> None:
    program = synthetic.moe_lm()
    layer = layer_of(program)
    count = next(op.op.experts.experts for op in layer.ops if op.op.experts is not None)
    for op, role in zip(layer.ops, tensor_parallel.roles(layer)):
        if op.op.kind is OpKind.GEMM and op.op.phase is Phase.FORWARD and op.n == count:
            assert role.cut is Cut.NONE
    layout = {"tp": "2", "ep": "4", "sharding": "replicate"}
    alone, shared = (priced(program, layout | {"expert_tp": degree}) for degree in ("1", "2"))
    assert shared.time["exposed all_gather"] > alone.time["exposed all_gather"]


def test_the_optimizer_of_zero1_updates_its_part_wherever_it_is() -> None:
    program = synthetic.dense_lm()
    here, host = (priced(program, {"sharding": "zero1", "offload_optimizer": flag}) for flag in ("false", "true"))
    full = priced(program, {"sharding": "replicate", "offload_optimizer": "true"})
    assert here.memory["optimizer"] > host.memory["optimizer"] == 0
    assert host.step_seconds < full.step_seconds


def test_only_the_share_that_is_recomputed_communicates_again() -> None:
    program = synthetic.dense_lm()
    layout = {"tp": "8", "recompute": "full", "recompute_whole": "true", "sharding": "zero1"}
    gathered = [priced(program, layout | {"recompute_share": s}).time["exposed all_gather"] for s in ("0", "0.5", "1")]
    assert gathered[1] - gathered[0] == pytest.approx(gathered[2] - gathered[1], rel=0.05) and gathered[1] > gathered[0]


def test_other_ways_of_a_stack() -> None:
    program = synthetic.dense_lm()
    base = priced(program, {})
    assert priced(program, {"gemm_dtype": "float8"}).time["compute"] < base.time["compute"]
    assert priced(program, {"attention_kernel": "fa2"}).time["compute"] > base.time["compute"]
    unfused = priced(program, {"attention_kernel": "unfused"})
    again = priced(program, {"attention_kernel": "unfused", "recompute": "core_attention"})
    assert unfused.memory["activations"] > 2 * base.memory["activations"] > again.memory["activations"]
    assert again.time["recompute"] > 0
    full, half = (priced(program, {"recompute": "full", "recompute_share": share}) for share in ("1", "0.5"))
    assert full.time["recompute"] == pytest.approx(2 * half.time["recompute"])
    assert full.memory["activations"] < half.memory["activations"] < base.memory["activations"]


def test_lean_states() -> None:
    program = synthetic.dense_lm()
    lean = priced(program, {"master_dtype": "bfloat16", "moment_dtype": "bfloat16"})
    base = priced(program, {})
    assert lean.memory["optimizer"] == pytest.approx(base.memory["optimizer"] / 2)
    assert lean.memory["parameters"] == pytest.approx(base.memory["parameters"] / 2)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({"tp": "3"}, "do not divide 16 GPUs"),
        ({"pipeline_chunks": "2"}, "without a pipeline"),
        ({"recompute_share": "1.5"}, "between 0 and 1"),
        ({"attention_kernel": "fa9"}, "no attention kernel 'fa9'"),
        ({"gemm_dtype": "float4"}, "no rate for float4"),
    ],
)
def test_what_cannot_be_priced_is_refused(layout: dict[str, str], words: str) -> None:
    with pytest.raises(Exception, match=words) as caught:
        priced(synthetic.dense_lm(), layout)
    assert isinstance(caught.value, PlanError) or type(caught.value).__name__ == "InputError"
