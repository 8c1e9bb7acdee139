"""The chunked loss head gives the loss and gradients of the full one, with a fraction of its logits alive."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from omnicompile.lowering.driver import with_outputs
from omnicompile.lowering.graph_capture import capture_forward
from omnicompile.passes import lower_forward
from omnicompile.passes.chunked_loss import chunked_cross_entropy, fuse_loss_head_pass
from omnicompile.passes.liveness import peak_bytes
from omnicompile.passes.rank_program import RankProgram
from omnicompile.passes.simulate import run_ranks
from omnicompile.plan import BlockPlan, Layout, LossHead, Mesh, Sharding

from .models import mixture_model, text_batch
from .parity import Batch, captured_for, program_of, reference, relative_errors, shifted_targets, whole_values

IGNORE = -100


def full_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, cap: float | None) -> Tensor:
    logits = nn.functional.linear(hidden, weight, bias)
    if cap is not None:
        logits = (logits / cap).tanh() * cap
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(logits.flatten(0, -2), target, ignore_index=IGNORE, reduction="sum")


def head_inputs(dtype: torch.dtype, tokens: int = 23) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, tokens, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(50, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(50, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    target = torch.randint(0, 50, (tokens,), generator=generator)
    target[::4] = IGNORE
    return hidden, weight, bias, target


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("cap", [None, 3.0], ids=["plain", "capped"])
def test_loss_and_gradients_are_those_of_the_full_head(dtype: torch.dtype, tolerance: float, cap: float | None) -> None:
    hidden, weight, bias, target = head_inputs(dtype)
    steps: tuple[tuple[str, Any], ...] = () if cap is None else (("scale", 1 / cap), ("tanh", None), ("scale", cap))
    steps = (*steps, ("cast", torch.promote_types(dtype, torch.float32)))
    loss = chunked_cross_entropy(hidden, weight, bias, target, IGNORE, 5, steps) * 0.5
    want = full_loss(hidden, weight, bias, target, cap) * 0.5
    got_grads = torch.autograd.grad(loss, (hidden, weight, bias))
    want_grads = torch.autograd.grad(want, (hidden, weight, bias))
    assert (loss - want).abs() <= tolerance * want.abs()
    for got, expected in zip(got_grads, want_grads):
        assert got.dtype == dtype
        assert (got - expected).norm() <= tolerance * expected.norm()


def test_a_frozen_head_and_no_target_at_all() -> None:
    hidden, weight, _, target = head_inputs(torch.float32)
    loss = chunked_cross_entropy(hidden, weight.detach(), None, torch.full_like(target, IGNORE), IGNORE, 5, ())
    (grad,) = torch.autograd.grad(loss, (hidden,))
    assert loss == 0
    assert not grad.any()


def test_logits_of_all_tokens_never_exist() -> None:
    hidden, weight, _, target = (t.detach() for t in head_inputs(torch.float32, tokens=64))
    weight = weight.repeat(20, 1)  # 1,000 classes

    def step(hidden: Tensor, weight: Tensor, chunked: bool) -> tuple[Tensor, ...]:
        leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        if chunked:
            loss = chunked_cross_entropy(*leaves, None, target, IGNORE, 8, ())
        else:
            loss = full_loss(*leaves, None, target, None)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    graphs = [make_fx(partial(step, chunked=chunked))(hidden, weight) for chunked in (False, True)]
    full, chunked = (peak_bytes(graph).beyond_inputs for graph in graphs)
    logits = 64 * weight.shape[0] * 4
    assert full > 2 * logits
    assert chunked < logits + 2 * weight.numel() * 4
    assert torch.allclose(graphs[0](hidden, weight)[2], graphs[1](hidden, weight)[2], atol=1e-5)


# The pass ----------------------------------------------------------------------------------------------------------


def lowered(model: nn.Module, batch: Batch, mesh: Mesh, rows: int) -> tuple[RankProgram, RankProgram, Any]:
    """(original, chunked, captured)."""
    captured, inputs = captured_for(model, batch)
    captured = with_outputs(captured, ("loss",))
    block = BlockPlan(Sharding.FSDP, Layout.SEQUENCE if mesh.sp > 1 else Layout.BATCH, mesh.sp, mesh.ep)
    original = program_of(captured, model, mesh, {"text": block}, batch["input_ids"].shape[1])
    program = fuse_loss_head_pass(replace(lower_forward(original), loss_head=LossHead.CHUNKED), rows=rows)
    return original, program, (captured, inputs)


def call_names(program: RankProgram) -> list[str]:
    return [str(node.target) for node in program.gm.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    "mesh", [Mesh(), Mesh(sp=2), Mesh(dp_shard=2), Mesh(dp_shard=2, sp=2)], ids=["one", "sp2", "fsdp2", "fsdp2-sp2"]
)
def test_a_model_with_a_chunked_head_trains_as_before(mesh: Mesh) -> None:
    model = mixture_model()
    batches = [text_batch(seed) for seed in range(mesh.data_ranks)]
    original, program, (captured, inputs) = lowered(model, batches[0], mesh, rows=7)
    assert program.notes == []
    assert not any("cross_entropy_loss" in name for name in call_names(program))
    want_loss, want = reference(model, batches)
    fixed = whole_values(original, captured, model)
    prepared = [inputs.prepare(batch) for batch in batches]
    count = torch.tensor(float(sum(shifted_targets(batch) for batch in batches)))
    losses, got, _ = run_ranks(program, lambda n, r: fixed[n] if n in fixed else prepared[r].get(n, count))
    assert abs(sum(losses) - want_loss) < 1e-5 * abs(want_loss)
    assert max(relative_errors(got, want).values()) < 1e-5


class Head(nn.Module):
    """A body and a head; `smoothing` and `keep` are what the pass refuses."""

    def __init__(self, smoothing: float = 0.0, keep: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.smoothing, self.keep = smoothing, keep

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.embed(input_ids)).float().view(-1, 20)
        loss = nn.functional.cross_entropy(logits, labels.view(-1), label_smoothing=self.smoothing, reduction="sum")
        return loss + (logits.pow(2).sum() * 1e-3 if self.keep else 0.0)


@pytest.mark.parametrize(
    ("model", "reason"),
    [(Head(smoothing=0.1), "label smoothing"), (Head(keep=True), "read elsewhere")],
    ids=["smoothing", "z-loss"],
)
def test_a_head_that_cannot_be_chunked_stays_whole_and_says_why(model: nn.Module, reason: str) -> None:
    captured, _ = capture_forward(model, text_batch(0, vocab=20))
    program = program_of(captured, model, Mesh(), {"text": BlockPlan()}, 32)
    program = fuse_loss_head_pass(replace(program, loss_head=LossHead.CHUNKED))
    assert any(reason in note for note in program.notes)
    assert any("cross_entropy_loss" in name for name in call_names(program))


def test_the_plan_decides() -> None:
    model = Head()
    captured, _ = capture_forward(model, text_batch(0, vocab=20))
    program = program_of(captured, model, Mesh(), {"text": BlockPlan()}, 32)
    before = [(n.op, n.name) for n in program.gm.graph.nodes]
    assert [(n.op, n.name) for n in fuse_loss_head_pass(program).gm.graph.nodes] == before
    chunked: fx.Graph = fuse_loss_head_pass(replace(program, loss_head=LossHead.CHUNKED)).gm.graph
    assert chunked.find_nodes(op="call_function", target=chunked_cross_entropy)


def test_it_compiles_as_one_graph() -> None:
    hidden, weight, bias, target = head_inputs(torch.float32)
    steps = (("scale", 0.5), ("tanh", None), ("cast", torch.float32))

    def head(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return chunked_cross_entropy(hidden, weight, bias, target, IGNORE, 8, steps) / 3

    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    got, want = (torch.autograd.grad(f(hidden, weight, bias), (hidden, weight, bias)) for f in (compiled, head))
    torch.testing.assert_close(got, want)
