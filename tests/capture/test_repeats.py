from omnicompile.program import Phase

from .small import Language, Layer, Wide, program_of, trace


def flops(program, phase):
    return sum(op.flops * s.count for s in program.segments for op in s.phase_ops(phase))


def test_equal_layers_are_one_kind() -> None:
    traced = trace(Language())
    (kind,) = traced.repeats.kinds
    assert kind.paths == ["layers.0", "layers.1", "layers.2"]
    assert traced.repeats.executions(kind.index) == 3


def test_layers_of_another_structure_are_another_kind() -> None:
    program = program_of(Language([Layer(), Wide(), Layer(), Wide()]))
    layers = [s for s in program.segments if s.role == "layer"]
    assert sorted((s.name, s.count) for s in layers) == [("text.layers@0", 2), ("text.layers@1", 2)]
    assert [(r.segment, r.count) for r in program.runs if "layers" in r.segment] == [
        ("text.layers@0", 1), ("text.layers@1", 1), ("text.layers@0", 1), ("text.layers@1", 1),
    ]  # fmt: skip


def test_a_plain_attribute_makes_another_kind() -> None:
    program = program_of(Language([Layer(), Layer(causal=False), Layer(causal=False)]))
    assert [s.count for s in program.segments if s.role == "layer"] == [1, 2]


def test_a_counting_attribute_does_not() -> None:
    layers = [Layer() for _ in range(3)]
    for index, layer in enumerate(layers):
        layer.layer_idx = index
    assert [s.count for s in program_of(Language(layers)).segments if s.role == "layer"] == [3]


def test_repeats_agree_with_every_layer_traced() -> None:
    model = Language([Layer(), Wide(), Layer(), Layer()])
    short, whole = (program_of(model, repeat=repeat) for repeat in (True, False))
    assert short.param_count == whole.param_count == sum(p.numel() for p in model.parameters())
    for phase in Phase:
        assert flops(short, phase) == flops(whole, phase)


def test_the_model_is_left_as_it_was() -> None:
    model = Language()
    trace(model)
    assert all("forward" not in layer.__dict__ for layer in model.layers)
