"""torchtitan: a Python module whose `configure` puts the plan into any of its training configurations.

Since its release 0.3 torchtitan's configurations are Python functions, one per model; the plan changes what it says of
parallelism, training, activation checkpointing and loss, and leaves the model's own.
"""

from __future__ import annotations

from omnicompile.export.choices import Choice, data_degrees, torchrun
from omnicompile.export.report import Keys, Said, approximated, mapped, refused
from omnicompile.export.rules import (
    Target,
    block_degree,
    key,
    keys,
    layout,
    of_main,
    only,
    overlap,
    resharding,
    same,
    sharding,
)
from omnicompile.export.torchtitan_training import ADAMW, RULES, optimizer_lines
from omnicompile.plan import LossHead, Plan
from omnicompile.recompute import Recompute

TITLE = "torchtitan"
PARALLEL, TRAINING = "parallelism", "training"
ATTENTION_KEPT = "KeepAttention"
POLICIES = {
    Recompute.NONE: "None",
    Recompute.SELECTIVE: "SelectiveAC.Config()",
    Recompute.EXCEPT_ATTENTION: f"{ATTENTION_KEPT}.Config()",
    Recompute.FULL: "FullAC.Config()",
}
PRECISIONS = ("bfloat16", "float32")


def _data(plan: Plan) -> Keys:
    replicas, shards = data_degrees(plan)
    return {
        f"{PARALLEL}.data_parallel_replicate_degree": replicas,
        f"{PARALLEL}.data_parallel_shard_degree": shards,
    }


def _context(plan: Plan) -> Keys:
    return {f"{PARALLEL}.context_parallel_degree": plan.mesh.sp * plan.mesh.cp}


def _sequence(plan: Plan, choice: Choice) -> Said:
    if choice.value == 1:
        return mapped(_context(plan))
    why = "context parallelism: keys and values travel, instead of all-to-all around attention"
    return approximated(why, _context(plan))


def _recompute(plan: Plan, choice: Choice) -> Said:
    written = {"activation_checkpoint": POLICIES[choice.value]}
    if choice.value is Recompute.SELECTIVE:
        return approximated("its selective policy keeps every second matrix product, not all", written)
    return mapped(written)


def _loss(plan: Plan, choice: Choice) -> Said:
    return mapped({"loss": choice.value is LossHead.CHUNKED})


def _precision(plan: Plan, choice: Choice) -> Said:
    if choice.value not in PRECISIONS:
        return refused(f"its precisions are {' and '.join(PRECISIONS)}")
    return mapped({f"{TRAINING}.mixed_precision_param": choice.value})


def _offload_optimizer(plan: Plan, choice: Choice) -> Said:
    written = {f"{TRAINING}.enable_cpu_offload": choice.value}
    why = "parameters and gradients are kept in host memory too, not only the optimizer's state"
    return approximated(why, written) if choice.value else mapped(written)


def _write(flat: Keys, header: list[str]) -> str:
    """The module; `loss`, `activation_checkpoint` and the optimizer are objects, all else plain values."""
    adamw = {name.removeprefix(f"{ADAMW}."): value for name, value in flat.items() if name.startswith(ADAMW)}
    special = ("loss", "activation_checkpoint", *(f"{ADAMW}.{name}" for name in adamw))
    body = [f"    config.{name} = {value!r}" for name, value in sorted(flat.items()) if name not in special]
    body += optimizer_lines(adamw) if adamw else []
    policy = flat["activation_checkpoint"]
    body.append(f"    config.activation_checkpoint = {policy}")
    chunked = "isinstance(config.loss, ChunkedLossWrapper.Config)"
    if flat["loss"]:
        body += [f"    if not {chunked}:", "        config.loss = ChunkedLossWrapper.Config(loss_fn=config.loss)"]
    else:
        body += [f"    if {chunked}:", "        config.loss = config.loss.loss_fn"]
    imports, classes = ["from torchtitan.components.loss import ChunkedLossWrapper"], []
    if adamw:
        imports.append("from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig")
    name = policy.partition(".")[0]
    if name == ATTENTION_KEPT:
        imports = ["from dataclasses import dataclass", "", *imports]
        name, classes = "SelectiveAC", ["", "", *_KEEP_ATTENTION]
    if name != "None":
        imports.append(f"from torchtitan.distributed.activation_checkpoint import {name}")
    lines = [*(f"# {line}" for line in header), "", *imports, *classes, "", "", "def configure(config):"]
    return (
        "\n".join(
            [
                *lines,
                '    """`config` of one of torchtitan\'s models, with the plan in it."""',
                *body,
                "    return config",
            ]
        )
        + "\n"
    )


_KEEP_ATTENTION = (
    f"class {ATTENTION_KEPT}(SelectiveAC):",
    '    """Keeps the input of a layer and the results of its attention."""',
    "",
    "    @dataclass(kw_only=True, slots=True)",
    "    class Config(SelectiveAC.Config):",
    "        pass",
    "",
    "    def get_save_ops(self):",
    '        return {op for op in super().get_save_ops() if "attention" in str(op) or "attn" in str(op)}',
)


TARGET = Target(
    name="torchtitan",
    title=TITLE,
    version="release 0.3.0",
    rules={
        "machine.gpus": same(),
        "machine.gpus_per_node": same(),
        "sample.seq_len": key(f"{TRAINING}.seq_len"),
        "mesh.dp_replicate": keys(_data),
        "mesh.dp_shard": keys(_data),
        "mesh.sp": _sequence,
        "mesh.ep": key(f"{PARALLEL}.expert_parallel_degree"),
        "mesh.tp": key(f"{PARALLEL}.tensor_parallel_degree"),
        "mesh.cp": keys(_context),
        "mesh.pp": key(f"{PARALLEL}.pipeline_parallel_degree"),
        "block.sharding": sharding(TITLE, {}, {}),
        "block.layout": layout(TITLE, lambda plan, choice: approximated("context parallelism, as mesh.sp")),
        "block.sp": block_degree("sp"),
        "block.ep": block_degree("ep"),
        "block.recompute": of_main(_recompute, TITLE),
        "block.offload": only(False, "no offloading of activations"),
        "block.reshard": resharding(
            key(f"{PARALLEL}.fsdp_reshard_after_forward", lambda value: "always" if value else "never"), TITLE
        ),
        "block.frozen": only(False, "no freezing"),
        "step.micro_batch": key(f"{TRAINING}.local_batch_size"),
        "step.accumulation": keys(lambda plan: {f"{TRAINING}.global_batch_size": plan.global_batch}),
        "step.loss_head": _loss,
        "step.offload_optimizer": _offload_optimizer,
        "step.param_dtype": _precision,
        "step.reduce_dtype": only("float32", "gradients are reduced in float32"),
        "stack.tp_sequence": key(f"{PARALLEL}.enable_sequence_parallel"),
        **overlap(TITLE, lambda plan, choice: mapped(why="FSDP2 and DDP do so")),
        **RULES,
    },
    fixed=lambda plan: {},
    to_set=(
        "a function in a module of yours that returns configure(C()), C torchtitan's configuration of the model",
        "data, tokenizer and checkpoints in that configuration",
    ),
    write=_write,
    launch=lambda plan: f"{torchrun(plan)} -m torchtitan.train --module YOUR.MODULE --config FUNCTION",
    without_train=("optimizer and schedule in that configuration",),
)
