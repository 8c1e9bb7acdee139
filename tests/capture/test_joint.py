import torch

from omnicompile.capture.joint import needs_gradient
from omnicompile.program import Phase

from .small import TOKENS, WIDTH, Language, Scored, joint_of, program_of, trace


def test_every_parameter_that_is_used_gets_a_gradient() -> None:
    program = program_of(Language())
    for segment in program.segments:
        assert any("weight" in op.feeds for op in segment.phase_ops(Phase.BACKWARD)), segment.name


def test_nothing_is_computed_for_inputs_without_a_gradient() -> None:
    joint = joint_of(lambda x, w: x @ w)
    assert joint.input_grads == []
    assert list(joint.weight_grads) == ["weights.0"]


def test_an_in_place_change_has_a_gradient() -> None:
    """Functionalized, `y /= z` becomes a copy, which torch has no derivative for."""

    def normalised(x, w):
        y = (x @ w).sigmoid()
        y /= y.sum(-1, keepdim=True)
        return y * 2.5

    joint = joint_of(normalised)
    assert list(joint.weight_grads) == ["weights.0"]


def test_burnt_in_tensors_keep_their_values() -> None:
    order = torch.arange(TOKENS).flip(0)
    joint = joint_of(lambda x, w: x[:, order] @ w)
    (value,) = joint.constants.values()
    assert value.tolist() == order.tolist()


def test_detached_values_need_no_gradient() -> None:
    traced = trace(Scored(lambda x, w: (x @ w) * (x @ w).detach()), {"inputs": torch.zeros(1, 5, WIDTH)})
    found = needs_gradient(traced)
    detached = [n for n in traced.graph.graph.nodes if "detach" in str(n.target)]
    assert detached and not any(n in found for n in detached)
