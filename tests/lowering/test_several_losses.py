"""Losses that are each a mean over targets of their own add up to what one process gives for the joined batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import dense_model, make_plan, run_ranks, text_batch, worst_error
from torch import Tensor, nn

import omnicompile
from omnicompile.errors import InputError, LoweringError
from omnicompile.lowering.driver import find_targets
from omnicompile.lowering.graph_capture import capture_forward
from omnicompile.lowering.proof import joined, prove
from omnicompile.lowering.tiny import TinyModel
from omnicompile.plan import Mesh

WEIGHT, CODES = 0.5, 8


class TwoLosses(nn.Module):
    """A language model with a second head; the second head's targets are codes made of data where `labels` say so."""

    def __init__(self) -> None:
        super().__init__()
        self.base = dense_model()
        torch.manual_seed(1)
        self.head = nn.Linear(32, CODES)
        self.book = nn.Parameter(torch.randn(4, CODES), requires_grad=False)

    def forward(self, input_ids: Tensor, labels: Tensor, code_labels: Tensor, feature_values: Tensor) -> dict[str, Any]:
        hidden = self.base.model(input_ids=input_ids).last_hidden_state
        text = self.base.loss_function(self.base.lm_head(hidden), labels, vocab_size=128)
        codes = (feature_values @ self.book).argmin(-1).masked_fill(code_labels == -100, -100)
        code = F.cross_entropy(self.head(hidden).float().flatten(0, 1), codes.flatten())
        return {"loss": text + WEIGHT * code, "losses": {"text": text, "code": code}}


def batch(rank: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(1, 128, (1, 32), generator=generator)
    labels, codes = ids.clone(), torch.zeros_like(ids)
    labels[:, : 4 + 9 * rank] = -100
    codes[:, 3 + 11 * rank :] = -100
    features = torch.randn(1, 32, 4, generator=generator)
    return {"input_ids": ids, "labels": labels, "code_labels": codes, "feature_values": features}


@pytest.mark.parametrize("mesh", [Mesh(dp_shard=2), Mesh(sp=2), Mesh(dp_replicate=2, sp=2)])
def test_every_loss_is_normalised_by_its_own_targets(mesh: Mesh) -> None:
    report = prove(TinyModel(TwoLosses().double(), lambda r: {k: to_double(v) for k, v in batch(r).items()}),
                   make_plan(("text",), mesh))  # fmt: skip
    assert report.equal, (report.loss_error, report.worst, report.verdict)


class OneLoss(nn.Module):
    """A cross-entropy, and what a loss may make of it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.base, self.kind = dense_model(1), kind
        self.scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.base.lm_head(self.base.model(input_ids=input_ids).last_hidden_state)
        text = self.base.loss_function(logits, labels, vocab_size=128)
        if self.kind == "focal":  # easy texts count less
            return text * (1 - torch.exp(-text))
        if self.kind == "uncertainty":  # a learned weight, and its price
            return text * torch.exp(-self.scale) + self.scale
        if self.kind == "regularizer":
            return text + 0.01 * self.base.lm_head.weight.square().sum()
        if self.kind == "sum":
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        if self.kind == "single tokens":
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").mean()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none").mean()


@pytest.mark.parametrize("kind", ["focal", "uncertainty", "regularizer", "sum", "single tokens"])
def test_what_is_not_linear_in_a_loss_or_no_loss_of_tokens(kind: str) -> None:
    """On data ranks with different numbers of targets."""
    plan = make_plan(("text",), Mesh(dp_shard=2, sp=2))
    report = prove(TinyModel(OneLoss(kind).double(), text_batch), plan)
    assert report.equal, (report.loss_error, report.worst, report.verdict)


def test_losses_of_single_tokens_that_cannot_be_followed_are_refused() -> None:
    with pytest.raises(LoweringError, match=r"losses of single tokens in .* cannot be averaged over data ranks"):
        prove(TinyModel(OneLoss("cut").double(), text_batch), make_plan(("text",), Mesh(dp_shard=2)))


def to_double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def test_targets_made_of_data_are_counted_by_what_the_host_leaves_in() -> None:
    captured, inputs = capture_forward(TwoLosses(), batch(0))
    targets = find_targets(captured)
    assert targets is not None
    assert targets.counts(inputs.prepare(batch(1))) == (32 - 13, 3 + 11)


class SoftTargets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)

    def forward(self, feature_values: Tensor) -> Tensor:
        return F.cross_entropy(self.head(feature_values), feature_values.softmax(-1))


def test_targets_that_are_no_classes_are_refused() -> None:
    captured, _ = capture_forward(SoftTargets(), {"feature_values": torch.randn(8, 4)})
    with pytest.raises(LoweringError, match="cannot be counted"):
        find_targets(captured)


def train(rank: int, world: int, sp: int) -> dict[str, Any]:
    plan = make_plan(("text",), Mesh(dp_shard=world // sp, sp=sp))
    model = TwoLosses()
    module = omnicompile.parallelize(model, plan, "cpu", example_batch=batch(0))
    mine = [batch(rank // sp), batch(rank // sp + 2)]
    single = module(**mine[0])
    targets = module.count_targets(mine)
    total = 0.0
    for i, micro in enumerate(mine):
        with module.accumulate(last=i == 1, targets=targets):
            output = module(**micro)
            output.loss.backward()
            total += output.loss.item()
    try:
        with module.accumulate(last=True, targets=5):
            module(**mine[0])
        refused = ""
    except InputError as error:
        refused = str(error)
    grads = {n: module.full_gradient(n) for n, p in model.named_parameters() if p.requires_grad}
    losses = {name: value.item() for name, value in single.losses.items()}
    return {"loss": total, "grads": grads, "losses": losses, "single": single.loss.item(), "refused": refused}


@pytest.mark.parametrize("sp", [1, 2])
def test_two_processes_report_and_sum_both_losses(sp: int) -> None:
    results = run_ranks(train, 2, sp)
    groups = 2 // sp
    first = joined([batch(r) for r in range(groups)])
    every = joined([batch(r + 2 * i) for r in range(groups) for i in range(2)])
    want = TwoLosses()(**first)
    model = TwoLosses()
    loss = model(**every)["loss"]
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for got in results:
        assert got["losses"] == pytest.approx({k: v.item() for k, v in want["losses"].items()}, rel=1e-5)
        assert got["single"] == pytest.approx(want["loss"].item(), rel=1e-5)
        assert got["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert worst_error(got["grads"], grads) < 1e-5
        assert "2 parts" in got["refused"]
