"""Every way of overlapping, alone and together, gives loss and gradients of one process within 1e-5 on eight ranks in
one process: replicas, shards, sequence and expert parallelism at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

from omnicompile.lowering.driver import with_outputs
from omnicompile.lowering.step_graph import ONLY, StepGraph, trace_step
from omnicompile.passes import lower_forward
from omnicompile.passes.rank_program import RankProgram
from omnicompile.passes.simulate import bound_to_fake_groups, rank_values, whole_gradient
from omnicompile.plan import Layout, Mesh, Overlap, Sharding
from omnicompile.torch_compat import local_ranks_mode, on_each_rank

from .models import block_plans, image_batches, stacked_mixture_vl_model, vision_language_model
from .parity import captured_for, program_of, reference, relative_errors, shifted_targets, whole_values

MODELS: Mapping[str, Callable[[], nn.Module]] = {"dense": vision_language_model, "mixture": stacked_mixture_vl_model}
MESHES = {"dense": Mesh(dp_replicate=2, dp_shard=2, sp=2), "mixture": Mesh(dp_replicate=2, dp_shard=2, sp=2, ep=2)}
NONE = Overlap(exchanges=False)
WAYS = {
    "none": NONE,
    "exchanges": Overlap(),
    "head groups": replace(NONE, head_groups=2),
    "expert chunks": replace(NONE, expert_chunks=2),
    "prefetch": replace(NONE, prefetch=2),
    "replica sums": replace(NONE, replica_sums=True),
    "together": Overlap(head_groups=2, expert_chunks=2, prefetch=2, replica_sums=True),
}


@dataclass(frozen=True)
class Known:
    """A model's captured program, the whole values of its placeholders by data rank, and what one process gives."""

    program: RankProgram
    values: list[dict[str, Tensor]]
    targets: Tensor
    loss: float
    gradients: dict[str, Tensor]


@lru_cache(maxsize=1)
def known(kind: str) -> Known:
    model, mesh = MODELS[kind](), MESHES[kind]
    batches = image_batches(mesh.data_ranks)
    loss, gradients = reference(model, batches)
    captured, inputs = captured_for(model, batches[0])
    captured = with_outputs(captured, ("loss",))
    program = program_of(captured, model, mesh, block_plans(mesh, Sharding.HSDP, Layout.SEQUENCE), 64)
    fixed = whole_values(program, captured, model)
    targets = torch.tensor(float(sum(shifted_targets(batch) for batch in batches)))
    return Known(program, [fixed | inputs.prepare(batch) for batch in batches], targets, loss, gradients)


def step_of(case: Known, overlap: Overlap) -> tuple[RankProgram, StepGraph]:
    bound = bound_to_fake_groups(lower_forward(replace(case.program, overlap=overlap)))
    return bound, trace_step(bound, ONLY)


def order(step: StepGraph) -> list[object]:
    return [node.target for node in step.gm.graph.nodes if node.op == "call_function"]


@lru_cache(maxsize=1)
def plain_order(kind: str) -> list[object]:
    return order(step_of(known(kind), NONE)[1])


def run(case: Known, bound: RankProgram, step: StepGraph) -> tuple[float, dict[str, Tensor]]:
    """The loss and whole gradients, by parameter name, that the step graph gives on all ranks."""
    with local_ranks_mode(bound.mesh.world), torch.no_grad():
        held = rank_values(bound, lambda name, rank: case.values[rank].get(name, case.targets))
        names = [node.name for node in step.gm.graph.find_nodes(op="placeholder")]
        loss, *grads = step.gm(*(held[name].detach() for name in names))
        whole = {}
        for name, grad in zip(step.gradients, grads):
            spec = bound.params[name]
            if name in step.summed:
                bound.params[name] = replace(spec, reduce_axes=())
            whole[spec.name] = whole_gradient(bound, name, grad)
        return sum(float(value) for value in on_each_rank(loss)), whole


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind, way", [(k, w) for k in MODELS for w in WAYS if (k, w) != ("dense", "expert chunks")])
def test_eight_ranks_equal_one_process(kind: str, way: str) -> None:
    overlap = WAYS[way] if kind == "mixture" else replace(WAYS[way], expert_chunks=1)
    case = known(kind)
    bound, step = step_of(case, overlap)
    loss, gradients = run(case, bound, step)
    assert abs(loss - case.loss) < 1e-5 * abs(case.loss)
    assert gradients.keys() == case.gradients.keys()
    errors = relative_errors(gradients, case.gradients)
    assert max(errors.values()) < 1e-5, max(errors.items(), key=lambda item: item[1])
    assert bool(step.summed) == overlap.replica_sums
    assert (order(step) == plain_order(kind)) == (overlap == NONE)  # it is another graph
