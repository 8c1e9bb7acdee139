"""accelerate's own reader takes the exported file, and what it makes of it is the plan."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from omnicompile.cluster import Cluster
from omnicompile.export import export_plan
from omnicompile.plan import BlockPlan, Layout, Mesh, Plan, Sharding
from omnicompile.recipes import recipes
from omnicompile.recompute import Recompute
from omnicompile.workload import Workload

pytest.importorskip("accelerate")


def plan(mesh: Mesh, **choices: object) -> Plan:
    layout = Layout.SEQUENCE if mesh.sp > 1 else Layout.BATCH
    block = BlockPlan(layout=layout, sp=mesh.sp, **choices)  # type: ignore[arg-type]
    return Plan("net.py", Cluster(mesh.world, gpus_per_node=4), Workload(), mesh, {"text": block})


def launched(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that `accelerate launch --config_file` gives the script's processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    file = folder / "config.yaml"
    file.write_text(text)
    script = folder / "script.py"
    script.write_text("")
    args = launch_command_parser().parse_args(["--config_file", str(file), str(script)])
    args, _, _ = _validate_launch_command(args)
    for name, value in prepare_multi_gpu_env(args).items():
        if os.environ.get(name) != value:
            monkeypatch.setenv(name, value)


def test_sharding_and_axes_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.utils import FullyShardedDataParallelPlugin

    wanted = plan(
        Mesh(dp_replicate=2, dp_shard=2, sp=2), sharding=Sharding.HSDP, recompute=Recompute.FULL, reshard=False
    )
    launched(export_plan(wanted, "accelerate").text, tmp_path, monkeypatch)
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is False
    assert plugin.activation_checkpointing is True
    plugin.set_mixed_precision("bf16")
    policy = plugin.mixed_precision_policy
    assert policy is not None and policy.param_dtype is torch.bfloat16
    assert policy.reduce_dtype is torch.bfloat16, "what the report says of step.reduce_dtype"
    degrees = ParallelismConfig()
    assert (degrees.dp_replicate_size, degrees.dp_shard_size, degrees.cp_size) == (2, 2, 2)
    assert degrees.total_size == wanted.mesh.world


def test_replication_is_plain_data_parallelism(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType

    text = export_plan(plan(Mesh(dp_shard=4), sharding=Sharding.REPLICATE), "accelerate").text
    (tmp_path / "config.yaml").write_text(text)
    found = load_config_from_file(str(tmp_path / "config.yaml"))
    assert found.distributed_type == DistributedType.MULTI_GPU
    assert found.fsdp_config == {} and found.parallelism_config == {}


def test_offloading_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin

    launched(
        export_plan(plan(Mesh(dp_shard=4), recompute=Recompute.FULL, offload=True), "accelerate").text,
        tmp_path,
        monkeypatch,
    )
    assert FullyShardedDataParallelPlugin().activation_checkpointing_offload is True


@pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: recipe.name)
def test_every_recipe_of_the_zoo_is_read(recipe: object, tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    from omnicompile.recipes import Recipe

    assert isinstance(recipe, Recipe)
    wanted = recipe.load()
    (tmp_path / "config.yaml").write_text(export_plan(wanted, "accelerate").text)
    found = load_config_from_file(str(tmp_path / "config.yaml"))  # raises for a key that it does not know
    assert (found.num_processes, found.num_machines) == (wanted.cluster.gpus, wanted.cluster.nodes)
