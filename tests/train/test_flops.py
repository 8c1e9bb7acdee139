"""FLOPs of the tokens that a step had, against the cost model at equal sizes and a count by hand."""

from __future__ import annotations

import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

import omnicompile
from omnicompile.capture.api import capture_model
from omnicompile.cost_model.hardware import load_hardware
from omnicompile.cost_model.step_model import StepModel
from omnicompile.plan import BlockPlan, Mesh, Plan
from omnicompile.planner.predict import model_flops
from omnicompile.program import Program
from omnicompile.train.flops import StepFlops, Work, frozen_blocks, mfu

HIDDEN, INNER, VOCABULARY, HEADS, DEPTH, SAMPLE = 32, 64, 96, 4, 2, 64


@pytest.fixture(scope="module")
def program() -> Program:
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=DEPTH,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=8, max_position_embeddings=256,
        tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    return capture_model(Qwen3ForCausalLM(config), omnicompile.Workload(seq_len=SAMPLE))


def test_whole_samples_cost_what_the_cost_model_says(program: Program) -> None:
    cluster = omnicompile.Cluster(gpus=2)
    blocks = {block.name: BlockPlan() for block in program.blocks}
    plan = Plan("m", cluster, omnicompile.Workload(seq_len=SAMPLE), Mesh(dp_shard=2), blocks)
    want = model_flops(StepModel(program, load_hardware("h100"), cluster), plan)
    one = Work(tokens=SAMPLE, token_squares=SAMPLE**2, samples=1)
    assert StepFlops(program)(one) * 2 == pytest.approx(want, rel=1e-9)


def test_short_samples_pay_for_their_own_tokens_and_pairs_only(program: Program) -> None:
    flops, lengths = StepFlops(program), (10, 30, 24)
    packed = Work(tokens=64, token_squares=sum(n * n for n in lengths), samples=3)
    one = Work(tokens=64, token_squares=64**2, samples=1)
    pairs = 64**2 - packed.token_squares
    products = 6 * 2 * HEADS * 8 * DEPTH / 2  # two forward, four backward, half of each under the causal mask
    assert flops(one) - flops(packed) == pytest.approx(products * pairs, rel=1e-6)
    linear = 6 * 64 * (DEPTH * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER) + HIDDEN * VOCABULARY)
    assert flops(packed) == pytest.approx(linear + products * packed.token_squares, rel=0.01)


def test_work_adds_up_and_none_costs_nothing(program: Program) -> None:
    half = Work(tokens=8, token_squares=64, samples=1)
    flops = StepFlops(program)
    assert flops(half + half) == pytest.approx(2 * flops(half))
    assert flops(Work()) == 0


def test_mfu_is_unknown_without_a_gpu_or_a_count() -> None:
    assert mfu(4e12, 2.0, 2, 10e12) == pytest.approx(0.1)
    assert mfu(4e12, 2.0, 2, None) is None and mfu(0.0, 2.0, 2, 10e12) is None


def test_a_block_is_frozen_when_nothing_of_it_is_trained(program: Program) -> None:
    names = dict(Qwen3ForCausalLM(Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=DEPTH,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=8, tie_word_embeddings=False,
    )).named_parameters())  # fmt: skip
    (block,) = [b.name for b in program.blocks]
    assert frozen_blocks(program, dict.fromkeys(names, False)) == {block}
    assert frozen_blocks(program, dict.fromkeys(names, False) | {"model.layers.1.mlp.up_proj.weight": True}) == set()
