import torch
from torch import nn

from omnicompile.program import Sym

from .small import PATCHES, WIDTH, Language, Layer, Seeing, image_and_text, program_of

ROW = WIDTH * 4


def test_a_language_model_is_embedding_layers_and_head() -> None:
    program = program_of(Language())
    assert [(s.name, s.role, s.count) for s in program.segments] == [
        ("text.embed", "embed", 1),
        ("text.layers", "layer", 3),
        ("text.head", "head", 1),
    ]
    assert program.blocks[0].kind == "backbone"
    assert program.edges == ()


def test_an_encoder_is_a_block_of_its_own() -> None:
    program = program_of(Seeing(), image_and_text())
    assert [(b.name, b.kind) for b in program.blocks] == [("vision", "encoder"), ("text", "backbone")]
    assert [s.name for s in program.block_segments("vision")] == ["vision.embed", "vision.blocks", "vision.projector"]
    assert program.block("vision").units == "I"
    assert program.block("text").units == ""


def test_runs_follow_the_forward() -> None:
    program = program_of(Seeing(), image_and_text())
    assert [(r.segment, r.count) for r in program.runs] == [
        ("vision.embed", 1), ("vision.blocks", 2), ("vision.projector", 1),
        ("text.embed", 1), ("text.layers", 3), ("text.head", 1),
    ]  # fmt: skip


def test_the_features_cross_from_encoder_to_backbone() -> None:
    (edge,) = program_of(Seeing(), image_and_text()).edges
    assert (edge.source, edge.target) == ("vision", "text")
    assert edge.nbytes == ROW * Sym.N


def test_parameters_outside_the_loss_are_idle() -> None:
    model = Seeing()
    program = program_of(model, image_and_text())
    idle = next(s for s in program.segments if s.role == "idle")
    assert {p.name for p in idle.params} == {"unused.weight", "unused.bias"}
    assert idle.ops == ()
    assert program.param_count == sum(p.numel() for p in model.parameters())


def test_a_tied_head_counts_its_weight_once() -> None:
    model = Language(tied=True)
    program = program_of(model)
    assert program.param_count == sum(p.numel() for p in model.parameters())
    (tied,) = [p for p in program.segment("text.head").params if p.tied_to]
    assert tied.tied_to == "embedding.weight"
    assert not any(p.tied_to for p in program.segment("text.embed").params)


def test_the_head_knows_its_logits() -> None:
    assert program_of(Language()).segment("text.head").logits == (Sym.S, 48)


def test_a_learned_query_after_the_layers_is_part_of_the_head_side() -> None:
    """What neither feeds a layer nor comes from one belongs to what follows the layers."""

    class Pooling(Seeing):
        def __init__(self) -> None:
            super().__init__()
            self.probe = nn.Parameter(torch.zeros(1, 1, WIDTH))
            self.query = nn.Linear(WIDTH, WIDTH)

        def forward(self, input_ids, pixel_values, labels):
            image = self.patch(pixel_values)
            for block in self.blocks:
                image = block(image)
            image = image * self.query(self.probe)
            x = self.embed(input_ids)
            return self.loss(torch.cat((x[:, :PATCHES] + self.projector(image), x[:, PATCHES:]), dim=1), labels)

    program = program_of(Pooling(), image_and_text())
    names = {p.name for p in program.segment("vision.projector").params}
    assert {"probe", "query.weight", "projector.weight"} <= names


def test_what_lies_between_layers_runs_between_them() -> None:
    class Injected(Seeing):
        """Features of the image are added again after the first layer."""

        def forward(self, input_ids, pixel_values, labels):
            image = self.patch(pixel_values)
            for block in self.blocks:
                image = block(image)
            image = self.projector(image)
            x = self.layers[0](self.embed(input_ids))
            x = torch.cat((x[:, :PATCHES] + image, x[:, PATCHES:]), dim=1)
            x = self.layers[2](self.layers[1](x))
            return nn.functional.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), labels.flatten())

    program = program_of(Injected(), image_and_text())
    assert [(r.segment, r.count) for r in program.runs if r.segment.startswith("text")] == [
        ("text.embed", 1), ("text.layers", 1), ("text.between", 1), ("text.layers", 2), ("text.head", 1),
    ]  # fmt: skip


def test_two_lists_of_one_name_are_told_apart() -> None:
    class Deep(Seeing):
        """A second stack of the encoder, in a module of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.deep = nn.Module()
            self.deep.blocks = nn.ModuleList(Layer(heads=4, causal=False) for _ in range(2))

        def forward(self, input_ids, pixel_values, labels):
            image = self.patch(pixel_values)
            for block in (*self.blocks, *self.deep.blocks):
                image = block(image)
            x = self.embed(input_ids)
            return self.loss(torch.cat((x[:, :PATCHES] + self.projector(image), x[:, PATCHES:]), dim=1), labels)

    program = program_of(Deep(), image_and_text())
    names = [s.name for s in program.segments]
    assert len(set(names)) == len(names)
    assert {"vision.blocks", "vision.deep.blocks"} <= set(names)
