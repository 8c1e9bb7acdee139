"""Step graphs of tiny models and what they give, on one rank or on all ranks in one process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from omnicompile.lowering.driver import with_outputs
from omnicompile.lowering.graph_capture import CapturedForward, LoweredInputs
from omnicompile.lowering.step_graph import StepGraph, trace_step
from omnicompile.passes import lower_forward
from omnicompile.passes.rank_program import RankProgram
from omnicompile.passes.simulate import bound_to_fake_groups, rank_values
from omnicompile.plan import BlockPlan, Layout, Mesh, Sharding
from omnicompile.recompute import Recompute
from omnicompile.torch_compat import local_ranks_mode, on_each_rank

from .models import image_batches, mixture_model, text_batch, vision_language_model
from .parity import Batch, captured_for, program_of, shifted_targets, whole_values

BLOCKS: Mapping[str, tuple[str, ...]] = {"vlm": ("text", "visual"), "moe": ("text",)}


@dataclass(frozen=True)
class Captured:
    """A tiny model captured once for all plans. batches: of equal shapes."""

    model: nn.Module
    batches: list[Batch]
    forward: CapturedForward
    inputs: LoweredInputs


@lru_cache(maxsize=2)
def captured(kind: str) -> Captured:
    """kind: "vlm" or "moe"."""
    torch.manual_seed(0)
    model = vision_language_model() if kind == "vlm" else mixture_model()
    batches = image_batches(2) if kind == "vlm" else [text_batch(seed, 128) for seed in range(2)]
    forward, inputs = captured_for(model, batches[0])
    return Captured(model, batches, with_outputs(forward, ("loss",)), inputs)


def lowered(kind: str, policy: Recompute, mesh: Mesh, offload: bool = False) -> tuple[RankProgram, RankProgram]:
    """(before, after) the passes."""
    given = captured(kind)
    layout = Layout.SEQUENCE if mesh.sp > 1 else Layout.BATCH
    block = BlockPlan(Sharding.FSDP, layout, mesh.sp, mesh.ep, recompute=policy, offload=offload)
    tokens = given.batches[0]["input_ids"].shape[1]
    program = program_of(given.forward, given.model, mesh, dict.fromkeys(BLOCKS[kind], block), tokens)
    return program, lower_forward(program)


def whole_values_of(kind: str, original: RankProgram, program: RankProgram, data_ranks: int) -> list[dict[str, Tensor]]:
    """By data rank: every placeholder's whole value, by name."""
    given = captured(kind)
    fixed = whole_values(original, given.forward, given.model)
    count = torch.tensor(float(sum(shifted_targets(batch) for batch in given.batches)))
    prepared = [given.inputs.prepare(batch) for batch in given.batches[:data_ranks]]
    names = [node.name for node in program.gm.graph.find_nodes(op="placeholder")]
    return [{name: (fixed | own).get(name, count).detach().clone() for name in names} for own in prepared]


def one_rank_step(kind: str, policy: Recompute, offload: bool = False) -> tuple[StepGraph, list[Tensor]]:
    """The step graph on a single rank, and its arguments."""
    original, program = lowered(kind, policy, Mesh(), offload)
    step = trace_step(program)
    (values,) = whole_values_of(kind, original, program, 1)
    return step, list(values.values())


def first_rank_step(kind: str, policy: Recompute, mesh: Mesh) -> tuple[StepGraph, list[Tensor]]:
    """The step graph of rank 0, with groups that do not communicate, and its arguments. Without expert parallelism,
    whose sizes are communicated."""
    original, program = lowered(kind, policy, mesh)
    bound = bound_to_fake_groups(program)
    values = whole_values_of(kind, original, program, 1)[0]
    for name, spec in bound.params.items():
        values[name] = spec.local_of(values[name], mesh, 0).clone()
    return trace_step(bound), list(values.values())


def run_on_all_ranks(
    kind: str, policy: Recompute, mesh: Mesh, offload: bool = False
) -> tuple[StepGraph, list[list[Tensor]]]:
    """The step graph, and by rank the loss and the gradients of its shards."""
    original, program = lowered(kind, policy, mesh, offload)
    bound = bound_to_fake_groups(program)
    step = trace_step(bound)
    whole = whole_values_of(kind, original, program, mesh.data_ranks)
    with local_ranks_mode(mesh.world), torch.no_grad():
        values = rank_values(bound, lambda name, data_rank: whole[data_rank][name])
        names = [node.name for node in step.gm.graph.find_nodes(op="placeholder")]
        outputs = [on_each_rank(value) for value in step.gm(*(values[name].detach() for name in names))]
    return step, [list(values) for values in zip(*outputs)]
