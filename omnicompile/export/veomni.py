"""VeOmni: one YAML file for training, read by its own argument parser (train, data and model sections)."""

from __future__ import annotations

from typing import Any

import yaml

from omnicompile.export.choices import Choice, data_degrees, torchrun
from omnicompile.export.report import Keys, Said, approximated, mapped, refused
from omnicompile.export.rules import (
    Target,
    block_degree,
    key,
    keys,
    layout,
    must_be_one,
    never,
    of_main,
    overlap,
    resharding,
    same,
    sharding,
)
from omnicompile.export.veomni_training import RULES
from omnicompile.plan import LossHead, Plan
from omnicompile.recompute import Recompute

TITLE = "VeOmni"
ACCELERATOR = "train.accelerator"
FSDP = f"{ACCELERATOR}.fsdp_config"
WHOLE = {f"{FSDP}.fsdp_mode": "ddp", "train.init_device": "cuda"}
SHARDED = {f"{FSDP}.fsdp_mode": "fsdp2", "train.init_device": "meta"}
TOWERS = {"vision": "train.freeze_vit", "audio": "train.freeze_audio_tower"}


def _fixed(plan: Plan) -> Keys:
    """Packing to a fixed budget of tokens, as a plan counts them."""
    return {"train.dyn_bsz": True, "train.pad_to_length": True}


def _data(plan: Plan) -> Keys:
    replicas, shards = data_degrees(plan)
    return {f"{ACCELERATOR}.dp_replicate_size": replicas, f"{ACCELERATOR}.dp_shard_size": shards}


def _recompute(plan: Plan, choice: Choice) -> Said:
    written = {"train.gradient_checkpointing.enable": choice.value is not Recompute.NONE}
    if choice.value in (Recompute.NONE, Recompute.FULL):
        return mapped(written)
    return approximated("VeOmni recomputes whole layers or nothing: whole layers (slower, less memory)", written)


def _frozen(plan: Plan, choice: Choice) -> Said:
    tower = TOWERS.get(choice.block)
    if tower is not None:
        return mapped({tower: choice.value})
    return refused("VeOmni freezes vision and audio towers only") if choice.value else mapped()


def _offload_optimizer(plan: Plan, choice: Choice) -> Said:
    written = {f"{FSDP}.offload": choice.value}
    why = "VeOmni keeps parameters and gradients in host memory too, not only the optimizer's state"
    return approximated(why, written) if choice.value else mapped(written)


def _write(flat: Keys, header: list[str]) -> str:
    return "".join(f"# {line}\n" for line in header) + yaml.safe_dump(nested(flat), sort_keys=False)


def nested(flat: Keys) -> dict[str, Any]:
    """{"a.b": 1} as {"a": {"b": 1}}, sections in the order model, data, train."""
    tree: dict[str, Any] = {"model": {}, "data": {}, "train": {}}
    for name, value in flat.items():
        *path, last = name.split(".")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return {section: values for section, values in tree.items() if values}


TARGET = Target(
    name="veomni",
    title=TITLE,
    version="commit d9774494, 2026-08-21",
    rules={
        "machine.gpus": same(),
        "machine.gpus_per_node": same(),
        "sample.seq_len": key("data.max_seq_len"),
        "mesh.dp_replicate": keys(_data),
        "mesh.dp_shard": keys(_data),
        "mesh.sp": key(f"{ACCELERATOR}.ulysses_size"),
        "mesh.ep": key(f"{ACCELERATOR}.ep_size"),
        "mesh.tp": must_be_one(TITLE, "tensor parallelism"),
        "mesh.cp": must_be_one(TITLE, "ring context parallelism"),
        "mesh.pp": must_be_one(TITLE, "pipeline parallelism"),
        "block.sharding": sharding(TITLE, WHOLE, SHARDED),
        "block.layout": layout(TITLE, lambda plan, choice: mapped(why="cut by ulysses_size in VeOmni's own models")),
        "block.sp": block_degree("sp"),
        "block.ep": block_degree("ep"),
        "block.recompute": of_main(_recompute, TITLE),
        "block.offload": of_main(key(f"{ACCELERATOR}.offload_config.enable_activation"), TITLE),
        "block.reshard": resharding(key(f"{FSDP}.reshard_after_forward"), TITLE),
        "block.frozen": _frozen,
        "step.micro_batch": key("train.micro_batch_size"),
        "step.accumulation": keys(lambda plan: {"train.global_batch_size": plan.global_batch}),
        "step.loss_head": key(
            "model.ops_implementation.cross_entropy_loss_implementation",
            lambda head: "chunk_loss" if head is LossHead.CHUNKED else "eager",
        ),
        "step.offload_optimizer": _offload_optimizer,
        "step.param_dtype": key(f"{FSDP}.mixed_precision.param_dtype"),
        "step.reduce_dtype": key(f"{FSDP}.mixed_precision.reduce_dtype"),
        **overlap(TITLE, lambda plan, choice: mapped(why="FSDP2 and DDP do so")),
        "overlap.exchanges": key(f"{ACCELERATOR}.enable_async"),
        "overlap.prefetch": never("one layer ahead (fsdp_config.forward_prefetch), not {value}"),
        **RULES,
    },
    fixed=_fixed,
    to_set=(
        "model.model_path or model.config_path: weights or a configuration of the plan's model",
        "data.train_path",
        "train.checkpoint.output_dir",
    ),
    write=_write,
    launch=lambda plan: f"{torchrun(plan)} TASK.py THIS.yaml",
    without_train=("train.optimizer",),
)
