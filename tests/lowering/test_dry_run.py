"""The dry run of one rank: memory, collectives and time of its real graph."""

from __future__ import annotations

import sys

import torch

from omnicompile.cluster import Cluster
from omnicompile.lowering.dry_run import DryRun, dry_run
from omnicompile.plan import BlockPlan, Layout, Mesh, Plan
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
