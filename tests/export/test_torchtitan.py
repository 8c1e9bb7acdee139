"""torchtitan itself takes the exported module: run where it is installed (`pip install torchtitan`, with triton)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from omnicompile.cluster import Cluster
from omnicompile.export import Outcome, export_plan
from omnicompile.plan import BlockPlan, LossHead, Mesh, Plan, Sharding
from omnicompile.recompute import Recompute
from omnicompile.train.options import OptimizerOptions, ScheduleKind, ScheduleOptions, TrainOptions
from omnicompile.train.schedule import lr_factor
from omnicompile.workload import Workload

KEYS = Path(__file__).parents[2] / "omnicompile" / "export" / "keys" / "torchtitan.yaml"


def plan(recompute: Recompute, head: LossHead, sp: int = 1) -> Plan:
    mesh = Mesh(dp_replicate=2, dp_shard=4, sp=sp, ep=2)
    block = BlockPlan(Sharding.HSDP, sp=sp, ep=2, recompute=recompute, reshard=False)
    return Plan("net.py", Cluster(mesh.world), Workload(seq_len=4096), mesh, {"text": block}, 2, 3, head)


def configured(text: str, folder: Path) -> Any:
    """`configure` of the exported module on a configuration of torchtitan's."""
    from torchtitan.trainer import Trainer

    (folder / "exported.py").write_text(text)
    spec = importlib.util.spec_from_file_location("exported", folder / "exported.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.configure(Trainer.Config())


@pytest.mark.parametrize("recompute", Recompute)
@pytest.mark.parametrize("head", LossHead)
def test_the_module_is_python(recompute: Recompute, head: LossHead) -> None:
    compile(export_plan(plan(recompute, head), "torchtitan").text, "exported.py", "exec")


@pytest.mark.parametrize("head", LossHead)
@pytest.mark.parametrize("recompute", Recompute)
def test_torchtitan_takes_it(recompute: Recompute, head: LossHead, tmp_path: Path) -> None:
    pytest.importorskip("torchtitan")
    from torchtitan.components.loss import ChunkedLossWrapper
    from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
    from torchtitan.distributed.parallel_dims import ParallelDims

    wanted = plan(recompute, head, sp=2)
    config = configured(export_plan(wanted, "torchtitan").text, tmp_path)
    dims = ParallelDims.from_config(config.parallelism, wanted.cluster.gpus)  # checks that the degrees multiply
    assert (dims.dp_replicate, dims.dp_shard, dims.cp, dims.ep) == (2, 4, 2, 2)
    assert config.training.global_batch_size == wanted.global_batch
    assert isinstance(config.loss, ChunkedLossWrapper.Config) is (head is LossHead.CHUNKED)
    policy = config.activation_checkpoint
    if recompute is Recompute.NONE:
        assert policy is None
    elif recompute is Recompute.FULL:
        assert isinstance(policy, FullAC.Config)
    else:
        assert isinstance(policy, SelectiveAC.Config)
        kept = {str(op) for op in policy.build().get_save_ops()}
        products = {op for op in kept if op.startswith(("aten.mm", "aten.linear"))}
        assert bool(products) is (recompute is Recompute.SELECTIVE)
        assert any("attention" in op for op in kept)


def test_the_list_of_keys_is_that_of_the_installed_release() -> None:
    configs = pytest.importorskip("torchtitan.config.configs")
    keys = yaml.safe_load(KEYS.read_text())["keys"]
    from torchtitan.trainer import Trainer

    sections = {"training": configs.TrainingConfig, "parallelism": configs.ParallelismConfig}
    components = ("debug", "lr_scheduler", "validator", "metrics")
    sections |= {name: type(getattr(Trainer.Config(), name)) for name in components}
    for section, kind in sections.items():
        assert {key for key in keys if key.startswith(f"{section}.")} == {
            f"{section}.{name}" for name in kind.__dataclass_fields__ if not name.startswith("_")
        }


class _Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wq = torch.nn.Linear(4, 4)
        self.attention_norm = torch.nn.LayerNorm(4)


@pytest.mark.parametrize("kind", ScheduleKind)
@pytest.mark.parametrize("warmup", [0, 4])
def test_torchtitan_trains_as_the_options_say(kind: ScheduleKind, warmup: int, tmp_path: Path) -> None:
    pytest.importorskip("torchtitan")
    options = TrainOptions(
        steps=20,
        optimizer=OptimizerOptions(lr=0.02, betas=(0.8, 0.9), weight_decay=0.3),
        schedule=ScheduleOptions(kind, warmup, 0.1, 6 if kind is ScheduleKind.WSD else None),
        clip=0.5,
        seed=7,
        checkpoint_every=5,
    )
    export = export_plan(plan(Recompute.NONE, LossHead.FULL), "torchtitan", options)
    config = configured(export.text, tmp_path)
    assert (config.training.steps, config.training.max_norm, config.debug.seed) == (20, 0.5, 7)
    assert config.checkpoint.enable and config.checkpoint.interval == 5
    config.optimizer.implementation = "for-loop"
    optimizers = config.optimizer.build(model_parts=[_Model()])
    (optimizer,) = optimizers.optimizers
    by_decay = {group["weight_decay"]: len(group["params"]) for group in optimizer.param_groups}
    assert by_decay == {0.0: 3, 0.3: 1}  # one matrix; two biases and the weight of a norm
    assert all(tuple(group["betas"]) == (0.8, 0.9) for group in optimizer.param_groups)
    schedulers = config.lr_scheduler.build(optimizers=optimizers, training_steps=config.training.steps)
    warm = {line.choice: line.said.outcome for line in export.lines}["train.schedule.warmup"]
    for step in range(20):
        if warm is Outcome.MAPPED or step >= warmup:
            ours = 0.02 * lr_factor(options.schedule, 20, step)
            assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([ours, ours]), step
        schedulers.step()
