"""Kernels put in the place of what models write out: what is recognised, that it goes over ranks, that values stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from omnicompile.errors import InputError
from omnicompile.kernels.choice import KernelChoice, parse_kernels
from omnicompile.lowering.cleanup import clean
from omnicompile.lowering.driver import with_outputs
from omnicompile.lowering.graph_capture import CapturedForward, LoweredInputs
from omnicompile.lowering.step_graph import trace_step
from omnicompile.passes import kernel_patterns as patterns
from omnicompile.passes import lower_forward
from omnicompile.passes.chunked_loss import has_chunked_loss
from omnicompile.passes.rank_program import RankProgram
from omnicompile.passes.repeated_halves import repeats_halves
from omnicompile.passes.simulate import run_ranks
from omnicompile.passes.verifier import verify_lowering
from omnicompile.plan import Layout, LossHead, Mesh, Sharding
from omnicompile.torch_compat import trace_pre_dispatch

from .models import block_plans, image_batches, mixture_model, text_batch, vision_language_model
from .parity import captured_for, program_of, reference, relative_errors, shifted_targets, whole_values
from .test_rules import Example, check, ints, r

LAYERS = "rms_norm=reference,swiglu=reference,rope=reference"
ALL = f"{LAYERS},cross_entropy=reference,linear_cross_entropy=reference,attention=reference,grouped_mm=reference"
omni, aten = torch.ops.omnicompile, torch.ops.aten
CPU = torch.device("cpu")
MESHES = [pytest.param(Mesh(dp_shard=2), marks=pytest.mark.slow), Mesh(sp=2)]


@lru_cache(maxsize=2)
def captured(kind: str) -> tuple[nn.Module, list[dict[str, Tensor]], CapturedForward, LoweredInputs]:
    """kind: "moe" or "vlm". Model, batches of two data ranks, the captured forward."""
    model = mixture_model() if kind == "moe" else vision_language_model()
    batches = [text_batch(seed) for seed in range(2)] if kind == "moe" else image_batches(2)
    forward, inputs = captured_for(model, batches[0])
    return model, batches, with_outputs(forward, ("loss",)), inputs


def original(kind: str, mesh: Mesh, kernels: str | None, head: LossHead = LossHead.FULL) -> RankProgram:
    model, batches, forward, _ = captured(kind)
    vision = None if kind == "moe" else Layout.SEQUENCE if mesh.sp > 1 else Layout.BATCH
    blocks = block_plans(mesh, Sharding.FSDP, vision)
    program = program_of(forward, model, mesh, blocks, batches[0]["labels"].shape[1])
    choice = None if kernels is None else KernelChoice.of(kernels, CPU)
    return replace(program, kernels=choice, loss_head=head)


def attentions(program: RankProgram) -> list[fx.Node]:
    return list(program.gm.graph.find_nodes(op="call_function", target=omni.attention.default))


def run(kind: str, before: RankProgram) -> tuple[RankProgram, float, dict[str, float]]:
    """The lowered program, the relative error of the loss, and those of the gradients, against the plain model."""
    model, batches, forward, inputs = captured(kind)
    batches = batches[: before.mesh.data_ranks]
    want_loss, want = reference(model, batches)
    after = lower_forward(before)
    fixed = whole_values(before, forward, model)
    prepared = [inputs.prepare(batch) for batch in batches]
    targets = torch.tensor(float(sum(shifted_targets(batch) for batch in batches)))
    losses, got, _ = run_ranks(after, lambda n, rank: fixed[n] if n in fixed else prepared[rank].get(n, targets))
    return after, abs(sum(losses) - want_loss) / abs(want_loss), relative_errors(got, want)


def count(program: RankProgram) -> Counter[str]:
    names = (str(node.target) for node in program.gm.graph.nodes if node.op == "call_function")
    return Counter(name.removesuffix(".default") for name in names)


EXPECTED = {
    "moe": {"omnicompile.rms_norm": 9, "omnicompile.rope": 4, "omnicompile.swiglu": 2, "omnicompile.cross_entropy": 1},
    "vlm": {"omnicompile.rms_norm": 5, "omnicompile.rope": 8, "omnicompile.swiglu": 2, "omnicompile.cross_entropy": 1},
}


@pytest.mark.parametrize("mesh", [*MESHES, Mesh(dp_shard=2, ep=2)], ids=str)
@pytest.mark.parametrize("kind", ["moe", "vlm"])
def test_loss_and_gradients_are_those_of_the_plain_model(kind: str, mesh: Mesh) -> None:
    if kind == "vlm" and mesh.ep > 1:
        pytest.skip("has no experts")
    after, loss_error, errors = run(kind, original(kind, mesh, ALL))
    found = count(after)
    assert {name: found[name] for name in EXPECTED[kind]} == EXPECTED[kind]
    assert not any(name in found for name in ("aten.rsqrt", "aten.silu", "aten.cross_entropy_loss"))
    assert all(node.args[-1] == "reference" for node in attentions(after))
    assert loss_error <= 1e-5
    assert max(errors.values()) <= 1e-5


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_chunked_head_is_fused(mesh: Mesh) -> None:
    after, loss_error, errors = run("vlm", original("vlm", mesh, ALL, LossHead.CHUNKED))
    found = count(after)
    assert found["omnicompile.linear_cross_entropy"] == 1 and not found["omnicompile.cross_entropy"]
    assert has_chunked_loss(after)  # the runtime does not say that the head is whole
    assert loss_error <= 1e-5 and max(errors.values()) <= 1e-5


def test_the_verifier_knows_the_operators() -> None:
    """Node by node on two ranks, without the placement rules."""
    model, batches, forward, inputs = captured("vlm")
    before = original("vlm", Mesh(sp=2), ALL)
    values = whole_values(before, forward, model) | inputs.prepare(batches[0])
    report = verify_lowering(before, lower_forward(before), values, shifted_targets(batches[0]))
    assert report.nodes > 50


def test_the_step_graph_calls_the_explicit_backward() -> None:
    targets = {node.target for node in trace_step(lower_forward(original("moe", Mesh(dp_shard=2), ALL))).gm.graph.nodes}
    backward = {omni.rms_norm_backward, omni.swiglu_backward, omni.rope_backward, omni.attention_backward}
    assert {one.default for one in backward} <= targets
    assert aten.rsqrt.default not in targets


@pytest.mark.parametrize("kernels", [None, "", "rms_norm=inductor,rope=inductor"])
def test_nothing_changes_unless_asked(kernels: str | None) -> None:
    plain = lower_forward(original("moe", Mesh(sp=2), None))
    assert lower_forward(original("moe", Mesh(sp=2), kernels)).gm.code == plain.gm.code


def test_one_variant_can_be_forced() -> None:
    after = lower_forward(original("vlm", Mesh(dp_shard=2), "attention.packed=reference"))
    given = {node.args[3] is not None: node.args[12:] for node in attentions(after)}
    assert given == {True: ("reference",), False: ()}


def test_a_kernel_that_does_not_fit_is_refused_by_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced for a dtype that it does not compute in."""
    before = original("moe", Mesh(dp_shard=2), None)
    before = replace(before, kernels=KernelChoice(parse_kernels("attention=flash_attn2"), "sm90"))
    with pytest.raises(InputError, match=r"attention=flash_attn2 does not fit .*self_attn"):
        lower_forward(before)


# Patterns ------------------------------------------------------------------------------------------------------------


def last(function: Callable[..., Tensor], *args: Tensor) -> tuple[fx.GraphModule, fx.Node]:
    gm = trace_pre_dispatch(function, list(args))
    clean(gm)
    (node,) = gm.graph.find_nodes(op="output")[0].all_input_nodes
    return gm, node


def norms(dtype: torch.dtype) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    def early(x: Tensor, w: Tensor) -> Tensor:
        y = x.to(torch.float32)
        return w * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)

    def late(x: Tensor, w: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt((y * y).mean(-1, keepdim=True) + 1e-6) * (1.0 + w.float())).type_as(x)

    def whole(x: Tensor, w: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), w, 1e-6)

    return {"early": early, "late": late, "whole": whole}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["early", "late", "whole"])
def test_a_norm_is_what_was_written(kind: str, dtype: torch.dtype) -> None:
    function = norms(dtype)[kind]
    x, w = torch.randn(3, 5, 16).to(dtype), torch.rand(16).to(dtype)
    gm, _ = last(function, x, w)
    found = next((m for n in gm.graph.nodes if (m := patterns.match_rms_norm(n)) is not None), None)
    assert found is not None and found.input.op == "placeholder" and found.weight.op == "placeholder"
    assert found.eps == 1e-6 and found.offset == (1.0 if kind == "late" else 0.0)
    leaves = [t.detach().requires_grad_() for t in (x, w)]
    y, _ = omni.rms_norm(*leaves, found.eps, found.offset, found.early_cast, "reference")
    want_leaves = [t.detach().requires_grad_() for t in (x, w)]
    want = function(*want_leaves)
    assert torch.equal(y, want) or torch.allclose(y, want, rtol=1e-5 if dtype is torch.float32 else 8e-3)
    grad = torch.randn(y.shape).to(dtype)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for got, right in zip(torch.autograd.grad(y, leaves, grad), torch.autograd.grad(want, want_leaves, grad)):
        torch.testing.assert_close(got, right, **tolerance)


def layer_norm_like(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt((x - x.mean()).pow(2).mean(-1, keepdim=True) + 1e-6))


def over_another_dimension(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + 1e-6))


def of_something_else(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1e-6))


def cubed(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6))


@pytest.mark.parametrize("function", [layer_norm_like, over_another_dimension, of_something_else, cubed])
def test_what_is_no_norm(function: Callable[..., Tensor]) -> None:
    gm, _ = last(function, torch.randn(16, 16), torch.randn(16))
    assert all(patterns.match_rms_norm(node) is None for node in gm.graph.nodes)


def sliced(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]


def chunked(x: Tensor) -> tuple[Tensor, Tensor]:
    first, second = x.chunk(2, -1)
    return first, second


@pytest.mark.parametrize("halves", [sliced, chunked])
def test_a_rotation_is_what_was_written(halves: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = halves(x)
        return x * cos + torch.cat((-second, first), -1) * sin

    x, cos, sin = torch.randn(2, 4, 6, 8, requires_grad=True), torch.randn(2, 1, 6, 8), torch.randn(2, 1, 6, 8)
    gm, node = last(rotate, x, cos, sin)
    found = patterns.match_rope(node)
    assert found is not None
    assert [found.x, found.cos, found.sin] == list(gm.graph.find_nodes(op="placeholder"))
    grad = torch.randn_like(x)
    got, want = omni.rope(x, cos, sin, "reference"), rotate(x, cos, sin)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, grad)[0] for y in (got, want)))


def backwards(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat((x[..., 4:], -x[..., :4]), -1) * sin


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat((-x[..., 1::2], x[..., ::2]), -1) * sin


def of_two(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat((-(x + 1)[..., 4:], x[..., :4]), -1) * sin


@pytest.mark.parametrize("function", [backwards, interleaved, of_two])
def test_what_is_no_rotation_of_halves(function: Callable[..., Tensor]) -> None:
    gm, _ = last(function, torch.randn(2, 8), torch.randn(2, 8), torch.randn(2, 8))
    assert all(patterns.match_rope(node) is None for node in gm.graph.nodes)


@pytest.mark.parametrize("repeated", [True, False])
def test_tables_with_equal_halves(repeated: bool) -> None:
    def table(places: Tensor, frequencies: Tensor) -> Tensor:
        angle = places.float().unsqueeze(-1) * frequencies
        return torch.cat((angle, angle if repeated else angle * 2), -1).cos()

    gm, node = last(table, torch.arange(6), torch.rand(4))
    assert repeats_halves(gm, node) is repeated


def test_tables_of_real_models_have_equal_halves() -> None:
    """Rotary embeddings in three dimensions, of text and of patches."""
    before = original("vlm", Mesh(dp_shard=2), ALL)
    found = [m for node in before.gm.graph.nodes if (m := patterns.match_rope(node)) is not None]
    assert len(found) == 8
    assert all(repeats_halves(before.gm, table) for m in found for table in (m.cos, m.sin))


def test_tables_that_are_trained_are_left_alone() -> None:
    """An operator without a gradient for its tables must not take the place of one that has it."""

    class Rotating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.angle = nn.Linear(8, 8), nn.Parameter(torch.randn(4, 8))

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            x = self.inner(x)
            y = x * self.angle.cos() + torch.cat((-x[..., 4:], x[..., :4]), -1) * self.angle.sin()
            return F.cross_entropy(y.flatten(0, -2), labels.flatten())

    model = Rotating()
    forward, _ = captured_for(model, {"x": torch.randn(1, 4, 8), "labels": torch.randint(0, 8, (1, 4))})
    program = program_of(forward, model, Mesh(dp_shard=2), block_plans(Mesh(dp_shard=2)), 4)
    found = count(lower_forward(replace(program, kernels=KernelChoice.of(ALL, CPU))))
    assert not found["omnicompile.rope"] and found["omnicompile.cross_entropy"] == 1


# Placement -----------------------------------------------------------------------------------------------------------


def examples() -> list[Example]:
    """The operators on tensors; `least`: cuts that they must have a choice for."""
    kernel = "reference"
    return [
        Example(omni.rms_norm.default, (r(2, 4, 6), r(6), 1e-6, 0.0, False, kernel), least=3),
        Example(omni.swiglu.default, (r(2, 4, 6), r(2, 4, 6), kernel), least=3),
        Example(omni.rope.default, (r(2, 4, 6, 8), r(2, 1, 6, 8), r(2, 1, 6, 8), kernel), least=3),
        Example(omni.rope.default, (r(6, 4, 8), r(6, 1, 8), r(6, 1, 8), kernel), least=2),
        Example(omni.cross_entropy.default, (r(8, 6), ints(6, 8), -100, kernel), least=1),
        Example(omni.linear_cross_entropy.default, (r(8, 6), r(10, 6), ints(10, 8), -100, kernel), least=1),
    ]


@pytest.mark.parametrize("example", examples(), ids=str)
def test_every_cut_gives_the_whole_value(example: Example) -> None:
    assert check(example) >= example.least
