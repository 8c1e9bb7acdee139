"""Megatron-LM: arguments of its training scripts, as a shell array to source.

Its language models are its own and take their sizes as arguments too; those are the model's, not the plan's. Sharded
parameters are Megatron-FSDP, all-to-all around attention is its context parallelism of type a2a.
"""

from __future__ import annotations

import shlex
from typing import Any

from omnicompile.export.choices import Choice, main_block, torchrun
from omnicompile.export.megatron_training import RULES
from omnicompile.export.report import Keys, Said, approximated, mapped, refused
from omnicompile.export.rules import Rule, Target, block_degree, key, keys, layout, of_main, only, overlap, same
from omnicompile.plan import LossHead, Plan, Sharding
from omnicompile.recompute import Recompute

TITLE = "Megatron-LM"
FSDP: Keys = {
    "--use-megatron-fsdp": True,
    "--use-distributed-optimizer": True,
    "--ckpt-format": "fsdp_dtensor",
}
RECOMPUTE: dict[Recompute, Keys] = {
    Recompute.NONE: {},
    Recompute.SELECTIVE: {"--recompute-granularity": "selective", "--recompute-modules": ["layernorm", "moe_act"]},
    Recompute.FULL: {
        "--recompute-granularity": "full", "--recompute-method": "uniform", "--recompute-num-layers": 1,
    },
}  # fmt: skip
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def language_model(rule: Rule) -> Rule:
    """For the main block. Its GPT script has no other: encoders are refused, choice by choice."""

    def checked(plan: Plan, choice: Choice) -> Said:
        if choice.block == main_block(plan):
            return rule(plan, choice)
        return refused("its GPT script trains a language model alone")

    return checked


def _sharded(plan: Plan) -> bool:
    return plan.blocks[main_block(plan)].sharding in (Sharding.FSDP, Sharding.HSDP)


def _sharding(plan: Plan, choice: Choice) -> Said:
    if choice.value is Sharding.REPLICATE:
        return mapped()
    if choice.value is Sharding.ZERO1:
        return mapped({"--use-distributed-optimizer": True})
    written = dict(FSDP)
    if choice.value is Sharding.HSDP and plan.mesh.dp_replicate > 1:
        written["--num-distributed-optimizer-instances"] = plan.mesh.dp_replicate
    return mapped(written)


def _reshard(plan: Plan, choice: Choice) -> Said:
    if not _sharded(plan):
        return mapped()
    if choice.value:
        return mapped({"--data-parallel-sharding-strategy": "optim_grads_params"})
    why = "parameters are kept whole at all times (ZeRO-2), not only from the forward to the backward"
    return approximated(why, {"--data-parallel-sharding-strategy": "optim_grads"})


def _sequence(plan: Plan) -> Keys:
    """Sequence parallelism is context parallelism with all-to-all; with a ring beside it, the two-level kind."""
    sp, ring = plan.mesh.sp, plan.mesh.cp
    written: Keys = {"--context-parallel-size": sp * ring}
    if sp > 1 and ring > 1:
        return written | {"--cp-comm-type": "a2a+p2p", "--hierarchical-context-parallel-sizes": [sp, ring]}
    return written | ({"--cp-comm-type": "a2a" if sp > 1 else "p2p"} if sp * ring > 1 else {})


def _experts(plan: Plan) -> Keys:
    if plan.mesh.ep == 1:
        return {"--expert-model-parallel-size": 1}
    return {
        "--expert-model-parallel-size": plan.mesh.ep,
        "--expert-tensor-parallel-size": plan.stack.expert_tp,
        "--moe-token-dispatcher-type": "alltoall",
        "--moe-grouped-gemm": True,
    }


def _tensor(plan: Plan) -> Keys:
    cut = plan.mesh.tp > 1 and plan.stack.tp_sequence
    return {"--tensor-model-parallel-size": plan.mesh.tp} | ({"--sequence-parallel": True} if cut else {})


def _overlap(plan: Plan) -> Keys:
    gathers = plan.blocks[main_block(plan)].sharding is not Sharding.REPLICATE
    return {"--overlap-grad-reduce": True} | ({"--overlap-param-gather": True} if gathers else {})


def _recompute(plan: Plan, choice: Choice) -> Said:
    if choice.value is Recompute.EXCEPT_ATTENTION:
        return approximated(
            "whole layers are recomputed, attention too (slower, less memory)", RECOMPUTE[Recompute.FULL]
        )
    written = RECOMPUTE[choice.value]
    if choice.value is Recompute.SELECTIVE:
        return approximated("norms and activations of experts are recomputed, not those of dense layers", written)
    return mapped(written)


def _precision(plan: Plan, choice: Choice) -> Said:
    if choice.value not in SHORT:
        return refused(f"its precisions are {', '.join(SHORT)}")
    return mapped({} if choice.value == "float32" else {f"--{SHORT[choice.value]}": True})


def _reduce(plan: Plan, choice: Choice) -> Said:
    if choice.value not in SHORT:
        return refused(f"its precisions are {', '.join(SHORT)}")
    if _sharded(plan):
        short = SHORT[choice.value]
        return mapped({"--megatron-fsdp-main-grads-dtype": short, "--megatron-fsdp-grad-comm-dtype": short})
    if choice.value == "bfloat16":
        return mapped({"--grad-reduce-in-bf16": True})
    if choice.value == "float32":
        return mapped({"--accumulate-allreduce-grads-in-fp32": True})
    return refused("without sharding gradients are reduced in float32 or bfloat16")


def _offload_optimizer(plan: Plan, choice: Choice) -> Said:
    return mapped({"--optimizer-cpu-offload": True} if choice.value else {})


def _write(flat: Keys, header: list[str]) -> str:
    lines = [f"# {line}" for line in header]
    lines += ["PLAN_ARGS=(", *(f"    {_argument(flag, value)}" for flag, value in flat.items()), ")"]
    return "\n".join(lines) + "\n"


def _argument(flag: str, value: Any) -> str:
    if value is True:
        return flag
    values = value if isinstance(value, list) else [value]
    return shlex.join([flag, *(str(item) for item in values)])


TARGET = Target(
    name="megatron",
    title=TITLE,
    version="commit d98e8a64, 2026-08-22",
    rules={
        "machine.gpus": same(),
        "machine.gpus_per_node": same(),
        "sample.seq_len": key("--seq-length"),
        "mesh.dp_replicate": same(),
        "mesh.dp_shard": same(),
        "mesh.sp": keys(_sequence),
        "mesh.ep": keys(_experts),
        "mesh.tp": keys(_tensor),
        "mesh.cp": keys(_sequence),
        "mesh.pp": key("--pipeline-model-parallel-size"),
        "block.sharding": language_model(_sharding),
        "block.layout": language_model(layout(TITLE, lambda plan, choice: mapped(why="all-to-all around attention"))),
        "block.sp": language_model(block_degree("sp")),
        "block.ep": language_model(block_degree("ep")),
        "block.recompute": language_model(of_main(_recompute, TITLE)),
        "block.offload": language_model(only(False, "offloading of activations is by module and number of layers")),
        "block.reshard": language_model(_reshard),
        "block.frozen": language_model(only(False, "no freezing of the language model")),
        "step.micro_batch": key("--micro-batch-size"),
        "step.accumulation": keys(lambda plan: {"--global-batch-size": plan.global_batch}),
        "step.loss_head": only(LossHead.FULL, "logits of a whole micro-batch: no chunked loss"),
        "step.offload_optimizer": _offload_optimizer,
        "step.param_dtype": _precision,
        "step.reduce_dtype": _reduce,
        "stack.tp_sequence": keys(_tensor),
        "stack.tp_overlap": key("--tp-comm-overlap"),
        "stack.pipeline_chunks": key("--num-virtual-stages-per-pipeline-rank"),
        "stack.expert_tp": keys(_experts),
        "stack.overlap_gradients": keys(_overlap),
        **overlap(TITLE, key("--overlap-grad-reduce")),
        **RULES,
    },
    fixed=lambda plan: {},
    to_set=(
        "sizes of the model, one of its own",
        "data and tokenizer",
        "CUDA_DEVICE_MAX_CONNECTIONS other than 1, with FSDP",
    ),
    write=_write,
    launch=lambda plan: f'source THIS.sh; {torchrun(plan)} pretrain_gpt.py "${{PLAN_ARGS[@]}}" ...',
    without_train=("optimizer and schedule",),
)
