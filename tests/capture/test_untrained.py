"""Parameters that the model itself does not let be trained: what a capture says of them and of their backward."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from omnicompile.program import OpKind, Phase, Program, Segment
from omnicompile.recompute import Recompute

from .small import WIDTH, Language, Layer, Seeing, image_and_text, program_of


class Adapted(nn.Module):
    """A linear layer that is not trained, and a narrow pair beside it that is."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def adapted() -> Language:
    model = Language([Adapted() for _ in range(3)])
    for part in (model.embedding, model.norm, model.head):
        part.requires_grad_(False)
    return model


def untrained(program: Program) -> set[str]:
    return {p.name for s in program.segments for p in s.params if not p.trained}


def weight_flops(segment: Segment) -> float:
    """Of products that only a weight's gradient needs."""
    products = (op for op in segment.phase_ops(Phase.BACKWARD) if op.kind is OpKind.GEMM)
    return sum(op.flops for op in products if op.feeds == {"weight"})


def test_every_parameter_is_trained_unless_the_model_says_otherwise() -> None:
    assert untrained(program_of(Language())) == set()
    model = Language()
    model.embedding.requires_grad_(False)
    assert untrained(program_of(model)) == {"embedding.weight"}


def test_layers_that_differ_in_what_is_trained_are_kinds_of_their_own() -> None:
    model = Language([Layer() for _ in range(4)])
    for layer in model.layers[:2]:
        layer.requires_grad_(False)
    layers = [s for s in program_of(model).segments if s.role == "layer"]
    assert [(s.count, s.trains) for s in layers] == [(2, False), (2, True)]
    assert [bool(weight_flops(s)) for s in layers] == [False, True]


def test_an_adapter_has_the_gradients_of_its_own_weights_alone() -> None:
    program = program_of(adapted())
    layer = next(s for s in program.segments if s.role == "layer")
    everything = program_of(Language([Adapted() for _ in range(3)]).requires_grad_(True))
    whole = next(s for s in everything.segments if s.role == "layer")
    base, narrow = WIDTH * WIDTH, 2 * 2 * WIDTH
    assert weight_flops(layer) / weight_flops(whole) == pytest.approx(narrow / (base + narrow))
    into = [[op.flops for op in s.phase_ops(Phase.BACKWARD) if op.feeds == {"input"}] for s in (layer, whole)]
    assert into[0] == into[1], "the gradient goes on to the layer before, through all weights"
    assert {p.name.rpartition(".")[0].rpartition(".")[2] for p in layer.params if p.trained} == {"down", "up"}


def test_less_is_kept_for_weights_without_a_gradient() -> None:
    """A head's input is kept for its weight's gradient, and for nothing else."""

    def kept(model: Language) -> float:
        head = next(s for s in program_of(model).segments if s.role == "head")
        return head.saved[Recompute.NONE].nbytes

    frozen = Language()
    frozen.head.requires_grad_(False)
    assert (kept(Language()) - kept(frozen)).is_positive


def test_an_encoder_that_is_not_trained_at_all() -> None:
    model = Seeing()
    for part in (model.patch, model.blocks, model.projector):
        part.requires_grad_(False)
    program = program_of(model, image_and_text())
    assert [s.trains for s in program.block_segments("vision")] == [False] * len(program.block_segments("vision"))
    assert all(not op.feeds & {"weight"} for s in program.block_segments("vision") for op in s.ops)
    assert all(p.trained for s in program.block_segments("text") for p in s.params)
