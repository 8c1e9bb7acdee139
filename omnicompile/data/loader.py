"""Steps of packed micro-batches, the same global batch for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch.distributed as dist
from torch import nn

from omnicompile.capture.inputs.facts import Facts, placeholder_id
from omnicompile.data.assemble import Assembler
from omnicompile.data.balance import Weights, attention_cost, deal, deal_in_order, exchange
from omnicompile.data.budget import Budget, attention_weights
from omnicompile.data.encode import IGNORE, LABELS, Encoded, Encoder, ProcessorEncoder
from omnicompile.data.items import dummy_items
from omnicompile.data.measure import Measured
from omnicompile.data.packing import Item, Pack, fill
from omnicompile.data.planner import StepPlanner
from omnicompile.data.policy import Policy
from omnicompile.data.read import Cache, Pool, Reader
from omnicompile.data.sources import first_kind, open_source
from omnicompile.data.stream import Stream
from omnicompile.errors import InputError
from omnicompile.runtime.budget import Budget as RowBudget
from omnicompile.runtime.budget import PackedImages

_PIXELS, _GRID = "pixel_values", "image_grid_thw"


@dataclass(frozen=True)
class Step:
    """What one optimizer step trains on. micro_batches: of this data rank, each the keyword arguments of a forward.

    step: counted from 1 over the whole run. epoch: the earliest of its samples. fill: real tokens and patches as shares
    of the budgets of all ranks. real_tokens, samples: of all ranks; a sample that was split counts once, with its first
    part. keys: (epoch, sample number, part) of all ranks' samples. attention: cost of the costliest rank over the mean.
    """

    micro_batches: list[dict[str, Any]]
    step: int
    epoch: int
    fill: dict[str, float]
    real_tokens: int
    samples: int
    keys: tuple[tuple[int, int, int], ...]
    attention: float


@dataclass
class _Planned:
    """A step before its samples are read. mine: packs of this rank. state: of the planner after it."""

    step: Step
    mine: list[Pack]
    state: dict[str, Any]


class PackedLoader:
    """Iterates over `Step`s; `make_loader` builds it.

    Iterating again goes on where the last iteration stopped. `state_dict` is that after the last step that was given
    out: what was planned or read ahead of it is planned and read again.
    """

    def __init__(
        self, planner: StepPlanner, assembler: Assembler, reader: Reader, pool: Pool, cache: Cache, data_rank: int,
        data_ranks: int, weights: Weights, balance: bool,
    ) -> None:  # fmt: skip
        self._planner, self._assembler, self._reader, self._pool, self._cache = planner, assembler, reader, pool, cache
        self._rank, self._ranks, self._weights, self._balance = data_rank, data_ranks, weights, balance
        self._state = planner.state_dict()
        self._ahead: _Planned | None = None
        self._wanted: list[int] = []

    @property
    def budget(self) -> Budget:
        return self._planner.budget

    @property
    def skipped(self) -> dict[str, int]:
        """Samples that the policies left out so far, by cause."""
        return dict(self._state["skipped"])

    def __iter__(self) -> Iterator[Step]:
        while (step := self._next()) is not None:
            yield step

    def _next(self) -> Step | None:
        planned = self._ahead or self._plan()
        if planned is None:
            return None
        micro_batches = self._rows(planned.mine)
        self._ahead = self._plan()  # workers read the next step while this one is trained on
        self._state = planned.state
        planned.step.micro_batches.extend(micro_batches)
        return planned.step

    def _plan(self) -> _Planned | None:
        planner, budget = self._planner, self._planner.budget
        packs = planner.next()
        if not packs:
            return None
        packs += [[] for _ in range(-len(packs) % self._ranks)]
        if self._balance:
            dealt = deal(exchange(packs, self._weights, budget), self._ranks, self._weights, budget)
        else:
            dealt = deal_in_order(packs, self._ranks)
        items = [item for pack in packs for item in pack]
        costs = [sum(attention_cost(pack, self._weights, budget) for pack in mine) for mine in dealt]
        step = Step(
            micro_batches=[],
            step=planner.step,
            epoch=min(item.key[0] for item in items),
            fill=fill(packs, budget),
            real_tokens=sum(item.size.tokens for item in items),
            samples=sum(item.key[2] == 0 for item in items),
            keys=tuple(sorted(item.key for item in items)),
            attention=max(costs) * len(costs) / sum(costs),
        )
        mine = dealt[self._rank]
        self._wanted = [n for n in sorted({i.key[1] for pack in mine for i in pack}) if n not in self._cache]
        self._pool.start(self._wanted)
        return _Planned(step, mine, planner.state_dict())

    def _rows(self, packs: list[Pack]) -> list[dict[str, Any]]:
        found = dict(zip(self._wanted, self._pool.finish()))
        for number in sorted({item.key[1] for pack in packs for item in pack} - found.keys()):
            kept = self._cache.take(number)
            found[number] = kept if kept is not None else self._reader[number]
        rows = [self._assembler.row([self._part(item, found[item.key[1]].parts) for item in pack]) for pack in packs]
        # Alone, a rank need not keep step with others: a row without a target changes nothing, and its loss, a mean
        # over no tokens, would be no number.
        useful = [row for row in rows if bool((row[LABELS] != IGNORE).any())]
        return useful if self._ranks == 1 and useful else rows

    def _part(self, item: Item, parts: tuple[Encoded, ...]) -> Encoded:
        _, number, part = item.key
        if part >= len(parts) or parts[part].size != item.size:
            raise InputError(
                f"{self._planner.source.where(number)} was encoded to another size than when it was measured: the "
                "files have changed, or the encoder gives a sample different sizes at different times"
            )
        return parts[part]

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; the same on every rank, and for any number of ranks."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises InputError for a state of other data."""
        self._planner.load_state_dict(state)
        self._state = self._planner.state_dict()
        self._ahead = None

    def example_batch(self) -> dict[str, Any]:
        """A micro-batch of exactly the budget, the same on every rank: what `parallelize` takes. Its segments are
        `budget.segments`. Reads samples until there was one with what the budget has beside text."""
        samples = (part for number in range(len(self._planner.source)) for part in self._reader[number].parts)
        return filled(self._assembler, self._planner.budget, samples)


def filled(assembler: Assembler, budget: Budget, samples: Iterator[Encoded]) -> dict[str, Any]:
    """A row of the first of `samples` (with images, where the budget has patches), filled up as ParallelModule does."""
    read: list[Encoded] = []

    def kept() -> Iterator[Encoded]:
        for sample in samples:
            read.append(sample)
            yield sample

    following = kept()
    items = dummy_items(assembler.model, budget, following)
    found = next((s for s in chain(list(read), following) if not budget.patches or _GRID in s.features), None)
    if found is None:
        raise InputError(
            f"the budget has {budget.patches} patches, but no sample has images: plan without images, or give others"
        )
    row, images = assembler.row([found]), None
    if budget.patches:
        pixels, token = row[_PIXELS], placeholder_id(Facts.of(assembler.model), "image")
        if token is None or pixels.dim() != 2:
            raise InputError(
                "the budget has patches, but the model takes no images as rows of patches with their grids"
            )
        images = PackedImages(budget.patches, pixels.shape[1], budget.merge, token, pixels.dtype)
    return RowBudget(budget.tokens, images, budget.parts, items).fill(row).batch


def make_loader(
    source: Any,
    encoder: Any,
    model: nn.Module,
    budget: Budget,
    packs: int,
    data_rank: int = 0,
    data_ranks: int = 1,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
    over_long: str = Policy.REFUSE,
    bad: str = Policy.REFUSE,
    look_ahead: int = 256,
    balance: bool = True,
    weights: tuple[int, int] | None = None,
    workers: int = 0,
    group: dist.ProcessGroup | None = None,
) -> PackedLoader:
    """A loader of packed steps for data rank `data_rank` of `data_ranks` (`rank // sp` of `plan.mesh.data_ranks`).

    source: see `open_source`. encoder: a Hugging Face processor or tokenizer, or a function (`encode.Encoder`). model:
    for its forward's arguments and its `get_rope_index`; may be on the meta device. packs: micro-batches of a step over
    all ranks and micro-steps; the same packs make the same steps for any data_ranks that divides it. epochs: None goes
    on for ever. over_long: refuse, split or skip; bad: refuse or skip. look_ahead: samples to pack out of. weights: of
    attention in text and vision (None: by the model's sizes). workers: processes that read and encode (as many again
    measure). group: gloo group of all ranks, which then measure samples in turns; None: each measures all.

    Raises InputError for arguments that do not go together, and for an empty source.
    """
    opened = open_source(source)
    over, bad_policy = _policy("over_long", over_long, Policy), _policy("bad", bad, (Policy.REFUSE, Policy.SKIP))
    if data_ranks < 1 or packs < 1 or packs % data_ranks or not 0 <= data_rank < data_ranks:
        raise InputError(
            f"{packs} packs a step cannot be dealt out to {data_ranks} data ranks (this is number {data_rank}): make "
            "packs a multiple of the data ranks"
        )
    if look_ahead < 1 or workers < 0 or (epochs is not None and epochs < 1):
        raise InputError(f"look_ahead {look_ahead}, workers {workers} and epochs {epochs}: at least 1, 0 and 1")
    kind = first_kind(opened, bad_policy)
    reader = Reader(opened, as_encoder(encoder), kind, budget, over)
    stream = Stream(len(opened), seed, shuffle, epochs)
    identity = f"{opened.fingerprint} seed={seed} shuffle={shuffle}"
    cache, alone = Cache(), group is None or dist.get_world_size(group) == 1
    measuring = Pool(replace(reader, whole=False) if workers and not alone else reader, workers, look_ahead)
    settings = f"{identity} {budget} {over} {packs}"
    measured = Measured(stream, measuring, cache, look_ahead, None if alone else group, settings)
    quiet = group is not None and dist.get_rank(group) != 0
    planner = StepPlanner(stream, opened, measured, budget, packs, look_ahead, over, bad_policy, identity, quiet)
    cost = Weights.of(*(weights or attention_weights(model)))
    assembler, pool = Assembler.of(model), Pool(reader, workers)
    return PackedLoader(planner, assembler, reader, pool, cache, data_rank, data_ranks, cost, balance)


def _policy(name: str, value: str, allowed: Any) -> Policy:
    if value not in list(allowed):
        raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return Policy(value)


def as_encoder(given: Any) -> Encoder:
    """A processor or tokenizer as an encoder; a function as it is."""
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    if isinstance(given, ProcessorMixin | PreTrainedTokenizerBase):
        return ProcessorEncoder(given)
    if not callable(given):
        raise InputError(f"the encoder is a {type(given).__name__}: give a processor, a tokenizer or a function")
    return given
