"""Models that load and cannot be traced: one line that names the cause, through the real capture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

HEAD = "import torch\nfrom torch import nn\n"
TAIL = """
def build():
    return Net()

def inputs(workload):
    ids = torch.zeros(1, 16, dtype=torch.long)
    return {"input_ids": ids, "labels": ids}
"""
NET = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(100, 8), nn.Linear(8, 100)

    def forward(self, input_ids, labels):
        x = self.embed(input_ids)
        BODY
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())
"""
UNGUESSABLE = """
from transformers import LlamaConfig, LlamaForCausalLM

class Net(LlamaForCausalLM):
    def forward(self, input_ids, frobnication, labels=None, **kwargs):
        return super().forward(input_ids=input_ids, labels=labels)

def build():
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2)
    return Net(LlamaConfig(num_hidden_layers=1, **sizes))
"""
CASES = [
    (HEAD + NET.replace("BODY", "x = 2 * x if x.sum() > 0 else x") + TAIL, r"control flow", "net.py:11"),
    (HEAD + NET.replace("BODY", "raise RuntimeError('broken')") + TAIL, "RuntimeError: broken", "net.py:11"),
    (HEAD + NET.replace("BODY", "return x") + TAIL, "loss", "scalar"),
    (HEAD + UNGUESSABLE, "frobnication", "forward"),
    (HEAD + NET + TAIL.replace("def inputs", "def unused"), "inputs()", "guess"),
]


@pytest.mark.parametrize(("text", "cause", "where"), CASES)
def test_what_cannot_be_traced(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, cause: str, where: str
) -> None:
    monkeypatch.setenv("OMNICOMPILE_CACHE", str(tmp_path))
    (tmp_path / "net.py").write_text(text.replace("BODY", "pass"))
    outcome = run("plan", str(tmp_path / "net.py"), "--gpus", "8")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    assert cause in outcome.err and where in outcome.err
