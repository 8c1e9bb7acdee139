"""Small exchanges between ranks on the host, so that a difference ends the job with its cause instead of a hang."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from omnicompile.errors import LoweringError, OmniCompileError

_HASH_BITS = 24  # squares of hashes, summed over all ranks, must fit into 63 bits


def short_hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> (32 - _HASH_BITS)


def gather_text(text: str, group: dist.ProcessGroup) -> list[str]:
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, text, group=group)
    return [str(item) for item in found]


def require_same(facts: Mapping[str, str], group: dist.ProcessGroup) -> None:
    """Raise LoweringError on every rank, naming the first of `facts` in which ranks differ and how."""
    for name, mine in facts.items():
        everyone = gather_text(mine, group)
        if len(set(everyone)) == 1:
            continue
        other = next(i for i, text in enumerate(everyone) if text != everyone[0])
        ours, theirs = _difference(everyone[0], everyone[other])
        raise LoweringError(f"ranks disagree on the {name}: rank 0 has {ours}, rank {other} has {theirs}")


def _difference(one: str, two: str) -> tuple[str, str]:
    """The first lines in which two texts differ."""
    lines = [one.splitlines(), two.splitlines()]
    for a, b in zip(*lines):
        if a != b:
            return repr(a.strip()), repr(b.strip())
    return f"{len(lines[0])} lines", f"{len(lines[1])} lines"


def step_agreement(count: int, signature: str, error: Exception | None, group: dist.ProcessGroup) -> int:
    """The sum of `count` over all ranks, after making sure that all run the same graph and none has failed to prepare.

    Raises on every rank: the rank's own error, or LoweringError naming the rank that failed or differs.
    """
    number = short_hash(signature)
    vector = torch.tensor([count, number, number * number, int(error is not None)], dtype=torch.int64)
    dist.all_reduce(vector, group=group)
    total, plain, squares, failed = vector.tolist()
    if failed:
        messages = gather_text("" if error is None else str(error), group)
        if isinstance(error, OmniCompileError):
            raise error
        rank = next(i for i, text in enumerate(messages) if text)
        raise LoweringError(f"rank {rank} could not prepare its batch: {messages[rank]}") from error
    if dist.get_world_size(group) * squares != plain * plain:
        require_same({"shapes of the batch": signature}, group)
    return int(total)
