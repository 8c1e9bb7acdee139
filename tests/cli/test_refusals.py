"""What cannot be distributed is refused before anything runs: one line that names the thing and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MODEL = """
import torch
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(64, 24), nn.LayerNorm(24), nn.Linear(24, 64)
        self.batch_norm = nn.BatchNorm1d(24)
        self.register_buffer("seen", torch.zeros(24))

    def attend(self, x, heads):
        q = x.unflatten(-1, (heads, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2)

    def forward(self, input_ids, pixel_values, labels):
        x = self.norm(self.embed(input_ids))
        BODY
        return F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

def build():
    return Net()

def inputs():
    ids = torch.arange(32)[None]
    return {"input_ids": ids, "labels": ids, "pixel_values": torch.randn(1, 8, 24)}
"""
CASES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "random": (
        "x = x + torch.randn_like(x)",
        (),
        ("aten::randn_like in model draws random numbers", "use dropout or torch.rand", "or an input of the batch"),
    ),
    "random choice": (
        "x = x * torch.multinomial(x.flatten(0, 1).softmax(-1), 1).view(1, -1, 1)",
        (),
        ("aten::multinomial in model draws random numbers", "or an input of the batch"),
    ),
    "size that depends on the data": (
        "x = x * (x.sum(-1) > 0).nonzero().sum()",
        (),
        ("whose size depends on the data", "in model", "mask it (torch.where)"),
    ),
    "heads": (
        "x = x + self.attend(x, 3)",
        ("mesh.sp=4",),
        ("sp=4 cuts 3 attention heads, which do not divide", "choose an sp that divides 3"),
    ),
    "shared parameter": (
        "x = x + self.norm(pixel_values).mean(1, keepdim=True)",
        ("vision.sharding=replicate",),
        ("parameter norm.weight is shared by blocks", "text: fsdp, vision: replicate", "give them the same sharding"),
    ),
    "buffer": (
        "self.seen.add_(x.detach().mean((0, 1)))",
        (),
        ("aten::add_ in model changes buffer seen in place", "compute a new tensor, update it outside"),
    ),
    "norm with statistics": (
        "x = self.batch_norm(x.transpose(1, 2)).transpose(1, 2)",
        (),
        ("model.batch_norm changes buffer batch_norm.num_batches_tracked in place", "put the module in eval()"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_with_thing_and_remedy(run: Callable[..., Any], tmp_path: Path, case: str) -> None:
    body, pins, said = CASES[case]
    path = tmp_path / "own.py"
    path.write_text(MODEL.replace("BODY", body))
    outcome = run("verify", str(path), "--gpus", "4", *(word for pin in pins for word in ("--pin", pin)))
    assert outcome.code == 2, outcome
    assert outcome.err.count("\n") == 1 and outcome.out == "", outcome
    for words in said:
        assert words in outcome.err


def test_writing_into_a_new_tensor_is_no_mutation_of_a_buffer(run: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(MODEL.replace("BODY", "x = x.clone(); x[:, 0] = 0; x.mul_(2)"))
    outcome = run("verify", str(path), "--gpus", "4")
    assert outcome.code == 0, outcome
