"""The step graph gives the loss and gradients that autograd gives."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_plan, mixture_model, reference_gradients, text_batch, worst_error

from omnicompile.capture.classify import is_view
from omnicompile.lowering.driver import default_lower, find_targets, rank_program, with_outputs
from omnicompile.lowering.graph_capture import capture_forward
from omnicompile.lowering.step_graph import trace_step
from omnicompile.passes.segments import is_forward
from omnicompile.plan import Mesh
from omnicompile.recompute import Recompute


@pytest.mark.parametrize("policy", list(Recompute))
def test_one_rank_gives_the_loss_and_every_gradient(policy: Recompute) -> None:
    model, batch = mixture_model(), text_batch(1)
    captured, inputs = capture_forward(model, batch)
    own = dict(model.named_parameters())
    targets = find_targets(captured)
    plan = make_plan(("text",), Mesh(), recompute=policy)
    program = rank_program(with_outputs(captured, ("loss",)), plan, dict.fromkeys(own, True), {32}, torch.float32)
    lowered = default_lower(program)
    step = trace_step(lowered)
    values, buffers = inputs.prepare(batch), dict(model.named_buffers())
    assert targets is not None
    arguments = []
    for node in step.gm.graph.find_nodes(op="placeholder"):
        spec = lowered.inputs.get(node.name)
        if spec is None:
            arguments.append(own[lowered.params[node.name].name].detach())
        elif spec.kind == "buffer":
            arguments.append(buffers[spec.name])
        else:
            count = torch.tensor(float(targets.count(values)))
            arguments.append(count if spec.kind == "count" else values.get(node.name, torch.tensor(0)))
    with torch.no_grad():
        loss, *grads = step.gm(*arguments)
    got = {lowered.params[name].name: grad for name, grad in zip(step.gradients, grads)}
    want, gradients = reference_gradients(model, [batch])
    assert abs(loss.item() - want) < 1e-6
    assert worst_error(got, gradients) < 1e-5
    assert (step.recomputed > 0) == (policy is not Recompute.NONE)


def kept_bytes(policy: Recompute) -> int:
    """What the forward leaves to the backward, parameters and inputs apart."""
    captured, _ = capture_forward(mixture_model(), text_batch(1))
    names = dict.fromkeys(captured.params.values(), True)
    plan = make_plan(("text",), Mesh(), recompute=policy)
    program = default_lower(rank_program(with_outputs(captured, ("loss",)), plan, names, {32}, torch.float32))
    total = 0
    for node in trace_step(program).gm.graph.nodes:
        value = node.meta.get("val")
        late = any(not is_forward(user) and user.op == "call_function" for user in node.users)
        if is_forward(node) and late and isinstance(value, torch.Tensor) and not is_view(node):
            total += value.numel() * value.element_size()
    return total


def test_recomputing_more_keeps_less() -> None:
    kept = [kept_bytes(policy) for policy in Recompute]
    assert kept == sorted(set(kept), reverse=True)


def test_parameters_are_gathered_again_for_the_backward() -> None:
    model, batch = mixture_model(), text_batch(1)
    captured, _ = capture_forward(model, batch)
    names = {name: True for name, _ in model.named_parameters()}
    plan = make_plan(("text",), Mesh(dp_shard=4))
    program = default_lower(rank_program(with_outputs(captured, ("loss",)), plan, names, {32}, torch.float32))
    step = trace_step(program)
    assert len(step.gradients) == len(names)
    assert _tensors(step.gm, "reduce_scatter") == len(names)
    assert step.gathers > len(names) // 2
    assert _tensors(step.gm, "all_gather") == len(names) + step.gathers


def _tensors(gm: torch.fx.GraphModule, kind: str) -> int:
    """How many tensors the collectives of a kind work on."""
    calls = [n for n in gm.graph.nodes if n.op == "call_function" and kind in str(n.target)]
    return sum(len(n.args[0]) if isinstance(n.args[0], list) else 1 for n in calls)
