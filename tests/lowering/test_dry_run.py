"""The dry run of one rank: memory, collectives and time of its real graph."""

from __future__ import annotations

import sys
from pathlib import Path
from time import process_time

import pytest
import torch

from omnicompile.capture.source import load_model_source
from omnicompile.cluster import Cluster
from omnicompile.lowering.dry_run import DryRun, dry_run
from omnicompile.lowering.full_size import full_batch
from omnicompile.plan import BlockPlan, Layout, Mesh, Plan
from omnicompile.planner.api import plan_source
from omnicompile.workload import Workload
from tests.passes.models import dense_model, mixture_model, text_batch


def _run(mesh: Mesh, model: torch.nn.Module, gpus_per_node: int = 8) -> DryRun:
    block = BlockPlan(layout=Layout.SEQUENCE if mesh.sp > 1 else Layout.BATCH, sp=mesh.sp, ep=mesh.ep)
    cluster = Cluster(gpus=mesh.world, gpus_per_node=gpus_per_node)
    plan = Plan("m", cluster, Workload(), mesh, {"text": block})
    return dry_run(model.to("meta"), text_batch(0), plan)


def test_parameters_and_optimizer_are_this_ranks_share() -> None:
    whole = sum(p.numel() for p in dense_model().parameters()) * 4
    one, four = _run(Mesh(dp_shard=1), dense_model()), _run(Mesh(dp_shard=4), dense_model())
    assert one.parameter_bytes == whole and whole / 4 <= four.parameter_bytes < whole / 3
    assert four.optimizer_bytes == 2 * four.parameter_bytes
    assert four.parameter_bytes < four.peak_bytes < one.peak_bytes


def test_collectives_are_counted_and_waited_for() -> None:
    run = _run(Mesh(dp_shard=2, sp=2), dense_model())
    gathers, nbytes = run.collectives[("all_gather", "dp_replicate,dp_shard,sp")]
    assert 3 < gathers < 10 and nbytes > 0 and ("all_to_all", "sp") in run.collectives
    assert run.timeline.exposed["all_gather"] > 0 and run.seconds > run.timeline.busy["compute"]


def test_experts_with_sizes_known_at_run_time() -> None:
    run = _run(Mesh(dp_shard=2, ep=2), mixture_model())
    assert ("all_to_all", "ep") in run.collectives and run.timeline.by_kind["grouped_gemm"] > 0


def test_groups_that_leave_the_node_cost_more() -> None:
    near, far = _run(Mesh(dp_shard=4), dense_model()), _run(Mesh(dp_shard=4), dense_model(), gpus_per_node=2)
    assert far.seconds > near.seconds and near.peak_bytes == far.peak_bytes


def test_nothing_of_the_planner_is_imported() -> None:
    import subprocess

    code = "import sys, omnicompile.lowering.dry_run; sys.exit(any('planner' in m for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


DENSE = """
def build():
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(
        vocab_size=152064, hidden_size=4096, intermediate_size=12288, num_hidden_layers=4, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=8192, tie_word_embeddings=False,
    )
    return AutoModelForCausalLM.from_config(config, dtype="bfloat16")
"""


def _beside_the_plan(spec: str, gpus: int, pins: dict[str, str]) -> tuple[float, float]:
    """(memory, time) of the dry run over what the planner says of its best plan."""
    source = load_model_source(spec, None)
    found = plan_source(source, Cluster(gpus=gpus), Workload(seq_len=8192), pins, cache=False).plans[0]
    prediction = found.prediction
    assert prediction is not None
    model = source.build_meta().train()
    run = dry_run(model, full_batch(source, model, found.workload, found.micro_batch), found)
    beside = prediction.memory["context"] + prediction.memory["allocator slack"]
    memory = (run.peak_bytes + run.optimizer_bytes) / (prediction.memory_total - beside)
    return memory, run.step_seconds(found.accumulation) / prediction.step_seconds


@pytest.mark.parametrize(
    "pins", [{"mesh.sp": "1"}, {"mesh.sp": "4", "text.recompute": "full"}], ids=["none", "sp full"]
)
def test_four_layers_agree_with_the_plan(pins: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(DENSE)
    memory, time = _beside_the_plan(str(path), 128, pins)
    assert memory == pytest.approx(1.0, abs=0.05) and time == pytest.approx(1.0, abs=0.10)


@pytest.mark.slow
@pytest.mark.parametrize("pins", [{}, {"mesh.sp": "4"}, {"loss_head": "chunked", "text.recompute": "full"}])
def test_a_7b_model_on_128_gpus_agrees_with_the_plan(pins: dict[str, str]) -> None:
    start = process_time()
    memory, time = _beside_the_plan("examples/qwen2_vl_7b.py", 128, pins)
    assert memory == pytest.approx(1.0, abs=0.05) and time == pytest.approx(1.0, abs=0.10)
    assert process_time() - start < 60
