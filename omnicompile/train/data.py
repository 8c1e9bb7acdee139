"""The data of a run: what `--data` names, as packed steps for a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from omnicompile.data.budget import Budget, ItemBudget, merge_of, suggest_budget
from omnicompile.data.encode import ProcessorEncoder
from omnicompile.data.items import ItemTokens, item_arguments
from omnicompile.data.loader import PackedLoader, as_encoder, make_loader
from omnicompile.data.policy import Policy
from omnicompile.data.read import sample_encoded
from omnicompile.data.sources import Source, open_source
from omnicompile.errors import InputError
from omnicompile.plan import Plan
from omnicompile.recipe import read_yaml
from omnicompile.runtime.packing import image_ranks
from omnicompile.schema import Place, decode

_MIX = 2048  # samples whose sizes decide on the budget of patches
_EVEN = 8  # so that recipes with sp up to it have the same budget, and the same packs


@dataclass(frozen=True)
class BudgetOptions:
    """Of a micro-batch. tokens: None takes seq_len x micro_batch of the recipe. patches, frames: None takes what fills
    up as fast as the tokens on a mix of the data, as do items that are not given. items: by the forward's argument,
    such as pixel_values: images of fixed size, clips. segments: samples, or images, that fit; 0 takes enough."""

    tokens: int | None = None
    patches: int | None = None
    frames: int | None = None
    segments: int = 0
    items: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class DataOptions:
    """source: files or a folder, relative to the file that says so. train_on: "assistant" or "all", of conversations.
    over_long, bad: what becomes of such samples: refuse, split (over_long only) or skip. look_ahead: samples to pack
    out of. balance: even out attention over ranks. workers: processes of a rank that read and encode."""

    source: tuple[str, ...]
    train_on: str = "assistant"
    shuffle: bool = True
    over_long: str = "refuse"
    bad: str = "refuse"
    look_ahead: int = 256
    balance: bool = True
    workers: int = 0
    budget: BudgetOptions = field(default_factory=BudgetOptions)


def load_data_options(given: str) -> DataOptions:
    """Of a YAML file, or of the files that `given` names as they are. Raises RecipeError or InputError."""
    path = Path(given)
    if path.suffix not in (".yaml", ".yml"):
        return DataOptions((given,))
    data, place = read_yaml(path, "data file")
    if isinstance(data.get("source"), str):
        data = data | {"source": [data["source"]]}
    found = decode(DataOptions, data, Place(place.file, place.path, place.lines))
    assert isinstance(found, DataOptions)
    return DataOptions(**(vars(found) | {"source": tuple(str(path.parent / name) for name in found.source)}))


@dataclass(frozen=True)
class Data:
    """An opened source with what packs it. processor: what the encoder is made of."""

    options: DataOptions
    source: Source
    processor: Any
    encoder: Any
    budget: Budget

    def loader(
        self, model: nn.Module, plan: Plan, data_rank: int, seed: int, epochs: int | None, shuffle: bool = True,
        group: dist.ProcessGroup | None = None,
    ) -> PackedLoader:  # fmt: skip
        """group: gloo, of all ranks; None for one process."""
        options = self.options
        return make_loader(
            self.source, self.encoder, model, self.budget, plan.accumulation * plan.mesh.data_ranks,
            data_rank=data_rank, data_ranks=plan.mesh.data_ranks, seed=seed, shuffle=shuffle and options.shuffle,
            epochs=epochs, over_long=options.over_long, bad=options.bad, look_ahead=options.look_ahead,
            balance=options.balance, workers=options.workers, group=group,
        )  # fmt: skip

    def name_of(self, key: Sequence[int]) -> str:
        """A sample by (epoch, number, part)."""
        _, number, part = key
        return f"{self.source.where(number)}{f' part {part}' if part else ''}"


def open_data(given: str, processor: Callable[[], Any], model: nn.Module, plan: Plan, like: Data | None = None) -> Data:
    """processor: makes the processor, tokenizer or encoder. like: other data whose budget this has to have.

    Raises InputError for a source that cannot be read, is empty, or does not fit the recipe.
    """
    options = load_data_options(given)
    source = open_source(options.source[0] if len(options.source) == 1 else list(options.source))
    made = processor()
    encoder = _encoder(made, options)
    budget = _budget(options, source, encoder, model, plan) if like is None else like.budget
    return Data(options, source, made, encoder, budget)


def _encoder(made: Any, options: DataOptions) -> Any:
    encoder = as_encoder(made)
    return ProcessorEncoder(made, options.train_on) if isinstance(encoder, ProcessorEncoder) else encoder


def _budget(options: DataOptions, source: Source, encoder: Any, model: nn.Module, plan: Plan) -> Budget:
    wanted, merge, parts = options.budget, merge_of(model), image_ranks(plan, model)
    tokens = wanted.tokens or plan.workload.seq_len * plan.micro_batch
    if tokens % plan.mesh.sp:
        raise InputError(f"a budget of {tokens} tokens does not divide over sp={plan.mesh.sp}: make it a multiple")
    complete = wanted.patches is not None and wanted.frames is not None and bool(wanted.segments)
    found, kinds = Budget(tokens, 0, 0, wanted.segments or 2), ItemTokens(model)
    if not complete or item_arguments(model):
        mix = [encoded.size for encoded in kinds.watched(sample_encoded(source, encoder, _MIX, Policy(options.bad)))]
        if not complete or kinds.found.keys() - wanted.items.keys():
            mix = [size for size in mix if size.tokens < tokens]
            found = suggest_budget(mix, tokens, merge, parts, wanted.segments, kinds.found)
    patches = found.patches if wanted.patches is None else wanted.patches
    unit = merge**2 * math.lcm(_EVEN, parts * plan.mesh.sp)
    return Budget(
        tokens, -(-patches // unit) * unit, found.frames if wanted.frames is None else wanted.frames,
        wanted.segments or found.segments, merge, parts, _items(found.items, wanted.items, kinds.found),
    )  # fmt: skip


def _items(
    found: tuple[ItemBudget, ...], wanted: Mapping[str, int], tokens: Mapping[str, int]
) -> tuple[ItemBudget, ...]:
    if unknown := sorted(wanted.keys() - tokens.keys()):
        raise InputError(
            f"the budget has items of {unknown[0]}, but samples of the data have "
            f"{'those of ' + ', '.join(sorted(tokens)) if tokens else 'none'}"
        )
    counts = {item.name: item.count for item in found} | dict(wanted)
    return tuple(ItemBudget(name, count, tokens[name]) for name, count in sorted(counts.items()) if count)
