"""Small exchanges between ranks on the host, so that a difference ends the job with its cause instead of a hang."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from omnicompile.errors import LoweringError, OmniCompileError

_HASH_BITS = 24  # squares of hashes, summed over all ranks, must fit into 63 bits
_SAMPLES = 64  # values of a parameter that are compared
_SHOWN = 4  # different values that a message shows
MOST_LOSSES = 16  # that are normalised by a count of their own
REMEDIES: Mapping[str, str] = {
    "plan": "give every rank the same recipe",
    "model": "build the same model on every rank",
    "weights": "load the same checkpoint on every rank, or set the same seed before building the model",
    "versions": "install the same versions on every host",
    "shapes of the example batch": "give every rank an example_batch of the same budget",
    "shapes of the batch": "pad the batches of all ranks to one budget, with the same keys and dtypes",
}


def short_hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> (32 - _HASH_BITS)


def gather_text(text: str, group: dist.ProcessGroup) -> list[str]:
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, text, group=group)
    return [str(item) for item in found]


def found_by_first(group: dist.ProcessGroup) -> Callable[[Callable[[], str]], str]:
    """Gives every rank of `group` the text that its first one finds; all ranks must ask together. An error of the first
    is raised on all."""

    def agree(find: Callable[[], str]) -> str:
        found: list[Any] = [None, None]
        if dist.get_rank(group) == 0:
            try:
                found[0] = find()
            except Exception as error:  # the others wait for it
                found[1] = error
        dist.broadcast_object_list(found, group=group, group_src=0)
        if found[1] is not None:
            raise found[1]
        return str(found[0])

    return agree


def installed_versions() -> str:
    """What the graph of a model depends on beside the model, one a line."""
    lines = [f"python {platform.python_version()}"]
    for name in ("torch", "transformers", "omnicompile"):
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"{name} is not installed")
    return "\n".join(lines)


def model_structure(model: nn.Module) -> str:
    parameters = (f"{n} {tuple(p.shape)} {p.dtype} {p.requires_grad}" for n, p in model.named_parameters())
    return "\n".join((type(model).__name__, *parameters))


def weight_samples(model: nn.Module) -> str:
    """A digest of a few values of every parameter, one a line; those on the meta device have none."""
    return "\n".join(f"{name} {_sample(value)}" for name, value in model.named_parameters() if not value.is_meta)


def _sample(value: torch.Tensor) -> str:
    flat = value.detach().reshape(-1)
    some = flat[:: max(1, flat.numel() // _SAMPLES)].cpu()
    data = some.float() if some.is_floating_point() else some
    return hashlib.sha256(data.contiguous().numpy().tobytes()).hexdigest()[:8]


def require_same(facts: Mapping[str, str], group: dist.ProcessGroup) -> None:
    """Raise LoweringError on every rank, naming the first of `facts` in which ranks differ, which ranks, and how."""
    mine = "\n".join(hashlib.sha256(text.encode()).hexdigest() for text in facts.values())
    digests = [text.split("\n") for text in gather_text(mine, group)]
    differ = [name for number, name in enumerate(facts) if len({d[number] for d in digests}) > 1]
    if not differ:
        return
    name, *others = differ
    also = f", and on the {', the '.join(others)}" if others else ""
    remedy = f": {REMEDIES[name]}" if name in REMEDIES else ""
    raise LoweringError(f"ranks disagree on the {name}{also}: {_difference(gather_text(facts[name], group))}{remedy}")


def _difference(everyone: Sequence[str]) -> str:
    """Which ranks have what in the first line in which any two differ."""
    lines = [text.splitlines() for text in everyone]
    longest = max(map(len, lines))
    padded = [[*found, *["nothing"] * (longest - len(found))] for found in lines]
    position = next(i for i in range(longest) if len({found[i] for found in padded}) > 1)
    ranks: dict[str, list[int]] = {}
    for rank, found in enumerate(padded):
        ranks.setdefault(found[position].strip(), []).append(rank)
    parts = [f"{ranks_text(who)} {'have' if len(who) > 1 else 'has'} {what!r}" for what, who in ranks.items()]
    more = f", and {len(parts) - _SHOWN} more differ" if len(parts) > _SHOWN else ""
    return ", ".join(parts[:_SHOWN]) + more


def ranks_text(ranks: Sequence[int]) -> str:
    """As in "rank 3" or "ranks 0 to 6, 8"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return f"{'ranks' if len(ranks) > 1 else 'rank'} {', '.join(parts)}"


def step_agreement(
    counts: Sequence[int], signature: str, error: Exception | None, group: dist.ProcessGroup
) -> tuple[int, ...]:
    """The sum of each of `counts` over all ranks, after making sure that all run the same graph and none has failed to
    prepare.

    Raises on every rank: the rank's own error, or LoweringError naming the ranks that failed or differ.
    """
    number = short_hash(signature)
    # One vector of one length on all ranks, also where a rank that failed does not know how many counts there are.
    padded = [*counts, *[0] * (MOST_LOSSES - len(counts))]
    vector = torch.tensor([number, number * number, int(error is not None), *padded], dtype=torch.int64)
    dist.all_reduce(vector, group=group)
    plain, squares, failed, *totals = vector.tolist()
    if failed:
        messages = gather_text("" if error is None else _cause(error), group)
        if isinstance(error, OmniCompileError):
            raise error
        bad = [rank for rank, text in enumerate(messages) if text]
        whose = "its batch" if len(bad) == 1 else "their batches"
        raise LoweringError(f"{ranks_text(bad)} could not prepare {whose}: {messages[bad[0]]}") from error
    if dist.get_world_size(group) * squares != plain * plain:
        require_same({"shapes of the batch": signature}, group)
    return tuple(totals[: len(counts)])


def _cause(error: Exception) -> str:
    if isinstance(error, OmniCompileError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
