"""accelerate: the YAML file of `accelerate launch --config_file`, with FSDP version 2.

It configures the launch, sharding and precision; batches, accumulation and the loss stand in the training script.
"""

from __future__ import annotations

from typing import Any

import yaml

from omnicompile.errors import PlanError
from omnicompile.export.choices import Choice, data_degrees, main_block, shards
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
    only,
    overlap,
    resharding,
    sharding,
)
from omnicompile.export.training import all_options
from omnicompile.plan import LossHead, Plan
from omnicompile.recompute import Recompute

TITLE = "accelerate"
FSDP, PARALLEL = "fsdp_config.fsdp_", "parallelism_config.parallelism_config_"
PRECISION = {"bfloat16": "bf16", "float16": "fp16", "float32": "no"}
SHARDED: Keys = {
    "distributed_type": "FSDP",
    f"{FSDP}version": 2,
    f"{FSDP}auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    f"{FSDP}state_dict_type": "SHARDED_STATE_DICT",
    f"{FSDP}cpu_ram_efficient_loading": True,
}


def _sharded(plan: Plan) -> bool:
    return shards(plan, plan.blocks[main_block(plan)].sharding) > 1


def _when_sharded(rule: Any) -> Any:
    """A key of FSDP, which is not there when nothing is sharded."""
    return lambda plan, choice: rule(plan, choice) if _sharded(plan) else mapped()


def _data(plan: Plan) -> Keys:
    if not _sharded(plan):
        return {}
    replicas, ranks = data_degrees(plan)
    return {f"{PARALLEL}dp_replicate_size": replicas, f"{PARALLEL}dp_shard_size": ranks}


def _axis(plan: Plan, choice: Choice) -> Said:
    """An axis of the parallelism config, which accelerate takes with FSDP only."""
    if choice.value == 1:
        return mapped()
    if not _sharded(plan):
        raise PlanError(
            f"accelerate has {choice.title} only beside sharded parameters: plan with --pin {choice.title}=1"
        )
    return mapped({f"{PARALLEL}{choice.name}_size": choice.value})


def _sequence(plan: Plan, choice: Choice) -> Said:
    if choice.value == 1:
        return mapped()
    if plan.mesh.cp > 1:
        raise PlanError("accelerate does not have sequence and context parallelism at once: plan with --pin mesh.cp=1")
    said = _axis(plan, Choice("mesh", "cp", choice.value))
    return approximated("with FSDP accelerate has ring context parallelism, not all-to-all around attention", said.keys)


def _precision(plan: Plan, choice: Choice) -> Said:
    if choice.value not in PRECISION:
        return refused(f"accelerate's precisions are {', '.join(PRECISION)}")
    return mapped({"mixed_precision": PRECISION[choice.value]})


def _reduce(plan: Plan, choice: Choice) -> Said:
    if choice.value == plan.param_dtype or not _sharded(plan):
        return mapped()
    return approximated(
        f"from this file gradients are reduced in {plan.param_dtype}; for {choice.value} give the script's "
        "FullyShardedDataParallelPlugin a mixed_precision_policy"
    )


def _recompute(plan: Plan, choice: Choice) -> Said:
    if not _sharded(plan):
        return (
            mapped() if choice.value is Recompute.NONE else refused("recompute goes with FSDP: enable it on the model")
        )
    written = {f"{FSDP}activation_checkpointing": choice.value is not Recompute.NONE}
    if choice.value in (Recompute.NONE, Recompute.FULL):
        return mapped(written)
    return approximated("accelerate recomputes whole layers or nothing: whole layers (slower, less memory)", written)


def _offload(plan: Plan, choice: Choice) -> Said:
    recompute = plan.blocks[choice.block].recompute
    if not choice.value:
        return mapped()
    if not _sharded(plan) or recompute is Recompute.NONE:
        return refused("activations go to host memory only where whole layers are recomputed")
    written = {f"{FSDP}activation_checkpointing_offload": True}
    if recompute is Recompute.FULL:
        return mapped(written)
    return approximated("only inputs of layers go to host memory: whole layers are recomputed", written)


def _offload_optimizer(plan: Plan, choice: Choice) -> Said:
    if not choice.value:
        return mapped()
    if not _sharded(plan):
        return refused("offloading goes with FSDP")
    why = "parameters and gradients are kept in host memory too, not only the optimizer's state"
    return approximated(why, {f"{FSDP}offload_params": True})


def _accumulation(plan: Plan, choice: Choice) -> Said:
    if choice.value == 1:
        return mapped()
    return refused(f"stands in the training script: Accelerator(gradient_accumulation_steps={choice.value})")


def _write(flat: Keys, header: list[str]) -> str:
    tree: dict[str, Any] = {}
    for name, value in sorted(flat.items()):
        section, dot, last = name.partition(".")
        if dot:
            tree.setdefault(section, {})[last] = value
        else:
            tree[name] = value
    return "".join(f"# {line}\n" for line in header) + yaml.safe_dump(tree, sort_keys=False)


TARGET = Target(
    name="accelerate",
    title=TITLE,
    version="release 1.15.0",
    rules={
        "machine.gpus": key("num_processes"),
        "machine.gpus_per_node": keys(lambda plan: {"num_machines": plan.cluster.nodes}),
        "sample.seq_len": never("stands in the training script: samples of {value} tokens"),
        "mesh.dp_replicate": keys(_data),
        "mesh.dp_shard": keys(_data),
        "mesh.sp": _sequence,
        "mesh.ep": only(1, "no expert parallelism with FSDP: experts are sharded as all parameters are"),
        "mesh.tp": _axis,
        "mesh.cp": _axis,
        "mesh.pp": must_be_one(TITLE, "pipeline parallelism for training"),
        "block.sharding": sharding(TITLE, {"distributed_type": "MULTI_GPU"}, SHARDED),
        "block.layout": layout(TITLE, lambda plan, choice: approximated("ring context parallelism, as mesh.sp")),
        "block.sp": block_degree("sp"),
        "block.ep": block_degree("ep"),
        "block.recompute": of_main(_recompute, TITLE),
        "block.offload": of_main(_offload, TITLE),
        "block.reshard": resharding(_when_sharded(key(f"{FSDP}reshard_after_forward")), TITLE),
        "block.frozen": only(False, "stands in the training script: requires_grad_(False) on the block's parameters"),
        "step.micro_batch": never("stands in the training script: a DataLoader with batch_size={value}"),
        "step.accumulation": _accumulation,
        "step.loss_head": only(LossHead.FULL, "the loss is the model's own, of whole logits"),
        "step.offload_optimizer": _offload_optimizer,
        "step.param_dtype": _precision,
        "step.reduce_dtype": _reduce,
        **overlap(TITLE, lambda plan, choice: mapped(why="FSDP2 and DDP do so")),
        **all_options(never("stands in the training script")),
        "train.clip": never("stands in the training script: accelerator.clip_grad_norm_(parameters, {value})"),
        "train.seed": never("stands in the training script: accelerate.utils.set_seed({value})"),
    },
    fixed=lambda plan: {"compute_environment": "LOCAL_MACHINE", "main_training_function": "main", "use_cpu": False},
    to_set=(
        "a script that builds the model",
        "main_process_ip and machine_rank, on several nodes",
    ),
    write=_write,
    launch=lambda plan: "accelerate launch --config_file THIS.yaml script.py",
)
