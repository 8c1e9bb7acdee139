"""Losses that divide by a number that the model counts in its batch: each data rank counts its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_models import dense_model, make_plan, text_batch
from torch import Tensor, nn
from torch.nn import functional as F

from omnicompile.errors import LoweringError
from omnicompile.lowering.graph_capture import capture_forward
from omnicompile.lowering.proof import prove
from omnicompile.lowering.tiny import TinyModel
from omnicompile.lowering.totals import Totals
from omnicompile.plan import Mesh

Count = Callable[[Tensor], Tensor]

COUNTS: dict[str, Count] = {
    "float": lambda mask: mask.double().sum(),
    "integer": lambda mask: mask.sum(),
    "least": lambda mask: mask.sum().clamp(min=1),
    "guard": lambda mask: mask.double().sum() + 1e-15,
    "share": lambda mask: mask.double().mean() * mask.numel(),
}
OTHERS: dict[str, Count] = {
    "inverse": lambda mask: 1.0 / (1.0 / mask.sum()),
    "last": lambda mask: mask.nonzero().max(),
    "product": lambda mask: mask.sum() * mask.sum(),
    "shifted": lambda mask: mask.sum() + 1,
    "most": lambda mask: mask.sum().clamp(max=64),
    "rounded": lambda mask: mask.sum().div(2, rounding_mode="floor"),
    "in place": lambda mask: mask.double().sum().sqrt_(),
    "some": lambda mask: mask[mask].double().mean(),
}


class Masked(nn.Module):
    """Losses of single tokens, those without a target masked out, over what `count` makes of the mask."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.base, self.count = dense_model(1), count

    def losses(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.base.lm_head(self.base.model(input_ids=input_ids).last_hidden_state)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten().clamp(min=0), reduction="none")

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        mask = labels.flatten() != -100
        return (self.losses(input_ids, labels) * mask.to(self.base.dtype)).sum() / self.count(mask)


class Otherwise(Masked):
    """Uses of numbers by name of the use."""

    def __init__(self, use: str) -> None:
        super().__init__(torch.sum)
        self.use = use

    def forward(self, input_ids: Tensor, labels: Tensor, **more: Tensor) -> Tensor:
        losses, mask = self.losses(input_ids, labels), labels != -100
        kept = losses * mask.flatten().to(losses.dtype)
        if self.use == "scaled one by one":
            return (kept * mask.sum().rsqrt()).sum()
        if self.use == "multiplied":
            return kept.mean() * mask.sum()
        if self.use == "beside a sum":
            logits = self.base.lm_head(self.base.model(input_ids=input_ids).last_hidden_state)
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / mask.sum()
        if self.use == "by sample":
            rows = kept.unflatten(0, labels.shape)
            return (rows.sum(1) / mask.sum(1)).mean()
        if self.use == "sample by sample":
            rows = kept.unflatten(0, labels.shape)
            return sum(rows[i].sum() / mask[i].sum() for i in range(len(rows))) / len(rows)
        return kept.sum() / more["number"]  # given


def without_targets(rank: int) -> dict[str, Tensor]:
    """The second rank has none."""
    batch = text_batch(rank)
    return batch if rank != 1 else {**batch, "labels": torch.full_like(batch["labels"], -100)}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("mesh", [Mesh(dp_shard=2), Mesh(dp_replicate=2, dp_shard=2, sp=2)], ids=["fsdp", "hsdp sp"])
def test_what_is_counted_is_averaged_over_data_ranks(count: str, mesh: Mesh) -> None:
    report = prove(TinyModel(Masked(COUNTS[count]).double(), text_batch), make_plan(("text",), mesh))
    assert report.equal, (report.loss_error, report.worst, report.verdict)
    counts = [int((text_batch(rank)["labels"] != -100).sum()) for rank in range(mesh.data_ranks)]
    assert len(set(counts)) > 1, "all data ranks count alike: the test shows nothing"


def test_a_rank_without_targets_counts_none() -> None:
    report = prove(TinyModel(Masked(COUNTS["least"]).double(), without_targets), make_plan(("text",), Mesh(dp_shard=2)))
    assert report.equal, (report.loss_error, report.worst, report.verdict)


class Pooled(nn.Module):
    """A class for each sample, of the mean over its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.base = dense_model(1)
        self.head = nn.Linear(32, 5)

    def forward(self, input_ids: Tensor, class_labels: Tensor) -> Tensor:
        hidden = self.base.model(input_ids=input_ids).last_hidden_state
        return F.cross_entropy(self.head(torch.tanh(hidden.mean(1))), class_labels)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("mesh", [Mesh(dp_shard=2), Mesh(dp_shard=2, sp=2)], ids=["fsdp", "fsdp sp"])
def test_what_is_pooled_over_a_sample_is_its_own(samples: int, mesh: Mesh) -> None:
    def batch(rank: int) -> dict[str, Tensor]:
        ids = torch.cat([text_batch(10 * rank + i)["input_ids"] for i in range(samples)])
        return {"input_ids": ids, "class_labels": torch.arange(samples) + rank}

    report = prove(TinyModel(Pooled().double(), batch), make_plan(("text",), mesh))
    assert report.equal, (report.loss_error, report.worst, report.verdict)


def test_counts_of_a_sample_stay_its_own() -> None:
    report = prove(TinyModel(Otherwise("by sample").double(), text_batch), make_plan(("text",), Mesh(dp_shard=2)))
    assert report.equal, (report.loss_error, report.worst, report.verdict)


def test_a_number_that_is_given_is_the_callers() -> None:
    def batch(rank: int) -> dict[str, Tensor]:
        return text_batch(rank) | {"number": torch.tensor(50)}

    captured, _ = capture_forward(Otherwise("given"), batch(0))
    assert not captured.numbers


@pytest.mark.parametrize("count", OTHERS)
def test_other_numbers_of_a_batch_are_refused(count: str) -> None:
    with pytest.raises(LoweringError, match=r"a number that the model computes from its batch, .* \(`mask.sum\(\)`\)"):
        prove(TinyModel(Masked(OTHERS[count]).double(), text_batch), make_plan(("text",), Mesh(dp_shard=2)))


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ("scaled one by one", "a number that the model computes from its batch"),
        ("multiplied", "a number that the model computes from its batch"),
        ("sample by sample", "a number that the model computes from its batch"),
        ("beside a sum", "beside a cross-entropy with reduction='sum'"),
    ],
)
def test_other_uses_of_counts_are_refused(use: str, message: str) -> None:
    with pytest.raises(LoweringError, match=message):
        prove(TinyModel(Otherwise(use).double(), text_batch), make_plan(("text",), Mesh(dp_shard=2)))


def test_counts_are_told_from_other_numbers() -> None:
    totals, labels = Totals(), torch.tensor([[3, -100, 5]])
    totals.given(labels)

    def result(func: Callable[..., Tensor], *args: object, **kwargs: object) -> Tensor:
        value = func(*args, **kwargs)
        totals.note(func, args, kwargs, value)
        return value

    mask = result(torch.Tensor.ne, labels, -100)
    count = result(torch.Tensor.sum, result(torch.Tensor.__getitem__, mask, (..., slice(1, None))))
    assert totals.kind(count) == "total"
    assert totals.kind(result(torch.Tensor.__mul__, count, 2)) == "total"
    held = result(torch.Tensor.clamp, count, min=1)
    assert totals.kind(held) == "total" and totals.least(held) == (count, 1.0)
    assert totals.kind(result(torch.Tensor.__mul__, held, 2)) == "number"
    assert totals.kind(result(torch.Tensor.sum, result(torch.Tensor.__getitem__, mask, 0))) == "number"
    assert totals.kind(result(torch.Tensor.sum, mask, 1)) == ""
    assert totals.kind(result(torch.Tensor.mul_, count, 3)) == "number"
