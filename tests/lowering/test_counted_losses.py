"""Losses that divide by a number that the model counts in its batch: each data rank counts its own."""

from __future__ import annotations

import pytest
import torch
from tiny_models import dense_model, make_plan, text_batch
from torch import Tensor, nn
from torch.nn import functional as F

from omnicompile.errors import LoweringError
from omnicompile.lowering.proof import prove
from omnicompile.lowering.tiny import TinyModel
from omnicompile.lowering.totals import Totals
from omnicompile.plan import Mesh

COUNTS = {
    "float": lambda mask: mask.double().sum(),
    "integer": lambda mask: mask.sum(),
    "least": lambda mask: mask.sum().clamp(min=1),
    "share": lambda mask: mask.double().mean() * mask.numel() + 0.0,
}
OTHERS = {
    "inverse": lambda mask: 1.0 / (1.0 / mask.sum()),
    "last": lambda mask: mask.nonzero().max(),
    "product": lambda mask: mask.sum() * mask.sum(),
}


class Masked(nn.Module):
    """The losses of single tokens, those without a target masked out, over what `count` makes of the mask."""

    def __init__(self, count) -> None:
        super().__init__()
        self.base, self.count = dense_model(1), count

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.base.lm_head(self.base.model(input_ids=input_ids).last_hidden_state)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten().clamp(min=0), reduction="none")
        mask = labels.flatten() != -100
        return (losses * mask.to(losses.dtype)).sum() / self.count(mask)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("mesh", [Mesh(dp_shard=2), Mesh(dp_replicate=2, dp_shard=2, sp=2)], ids=["fsdp", "hsdp sp"])
def test_what_is_counted_is_averaged_over_data_ranks(count: str, mesh: Mesh) -> None:
    report = prove(TinyModel(Masked(COUNTS[count]).double(), text_batch), make_plan(("text",), mesh))
    assert report.equal, (report.loss_error, report.worst, report.verdict)
    counts = [int((text_batch(rank)["labels"] != -100).sum()) for rank in range(mesh.data_ranks)]
    assert len(set(counts)) > 1, "all data ranks count alike: the test shows nothing"


@pytest.mark.parametrize("count", OTHERS)
def test_other_numbers_of_a_batch_are_refused(count: str) -> None:
    with pytest.raises(LoweringError, match=r"a number that the model computes from its batch, .* \(`mask.sum\(\)`\)"):
        prove(TinyModel(Masked(OTHERS[count]).double(), text_batch), make_plan(("text",), Mesh(dp_shard=2)))


def test_sums_are_told_from_other_numbers() -> None:
    totals = Totals()
    mask = torch.tensor([True, False])

    def result(func, *args):
        value = func(*args)
        totals.note(func, args, value)
        return value

    total = result(torch.Tensor.sum, mask)
    shifted = result(torch.Tensor.__add__, total, 1)
    assert total in totals and shifted in totals and result(torch.Tensor.add, total, shifted) in totals
    assert result(torch.Tensor.max, mask.int()) not in totals
    assert result(torch.Tensor.mul, total, shifted) not in totals
    assert result(torch.Tensor.__rtruediv__, total, 1) not in totals
