"""Every sample is seen exactly once per epoch, whatever the packing, the number of ranks and interruptions."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import encode, records
from tiny_models import dense_model, run_ranks, vision_language_model
from torch import nn

from omnicompile.data import Budget, PackedLoader, make_loader
from omnicompile.data.sources import Records
from omnicompile.errors import InputError


@cache
def _model() -> nn.Module:
    return vision_language_model()


def _loaders(ranks: int, count: int, budget: Budget, **options: Any) -> list[PackedLoader]:
    return [
        make_loader(records(count), encode, _model(), budget, data_rank=rank, data_ranks=ranks, **options)
        for rank in range(ranks)
    ]


CASES: dict[str, Any] = {
    "count": st.integers(1, 40),
    "packs": st.sampled_from([4, 8]),
    "tokens": st.integers(90, 200),
    "segments": st.integers(4, 12),
    "look_ahead": st.integers(1, 40),
    "stops": st.lists(st.integers(1, 4), max_size=4),
    "seed": st.integers(0, 5),
    "balance": st.booleans(),
    "shuffle": st.booleans(),
    "changed": st.booleans(),
}


@settings(max_examples=6, deadline=None)
@given(**CASES)
def test_every_sample_once_per_epoch(**case: Any) -> None:
    _check_exactly_once(**case)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(**CASES)
def test_every_sample_once_per_epoch_in_many_cases(**case: Any) -> None:
    _check_exactly_once(**case)


def _check_exactly_once(
    count: int, packs: int, tokens: int, segments: int, look_ahead: int, stops: list[int], seed: int, balance: bool,
    shuffle: bool, changed: bool,
) -> None:  # fmt: skip
    """Interrupted after each of `stops` steps, with 4, 2 and 1 ranks in turn; changed: also with other packing."""
    budget = Budget(tokens, 192, segments=segments, merge=2)
    options: dict[str, Any] = {
        "packs": packs, "look_ahead": look_ahead, "seed": seed, "balance": balance, "shuffle": shuffle, "epochs": 2,
    }  # fmt: skip
    whole = [step.keys for step in _loaders(1, count, budget, **options)[0]]
    seen: list[tuple[tuple[int, int, int], ...]] = []
    state = None
    for number, stop in enumerate([*stops, None]):
        if changed and number:
            options |= {"look_ahead": look_ahead + 3 * number, "packs": (4, 8)[number % 2], "balance": not balance}
            budget = Budget(tokens + 16 * number, 192, segments=segments, merge=2)
        loaders = _loaders((4, 2, 1)[number % 3], count, budget, **options)
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(json.loads(json.dumps(state)))
        for taken, steps in enumerate(zip(*loaders, strict=True)):
            assert len({step.keys for step in steps}) == 1
            assert len({len(step.micro_batches) for step in steps}) == 1
            rows = [row for step in steps for row in step.micro_batches]
            empty = sum(not bool((row["labels"] != -100).any()) for row in rows)
            tokens_given = sum(row["input_ids"].numel() for row in rows)
            assert tokens_given == steps[0].real_tokens + len(rows) + empty  # one token of padding each, two if empty
            seen.append(steps[0].keys)
            if taken + 1 == stop:
                break
        assert len({json.dumps(loader.state_dict()) for loader in loaders}) == 1
        state = loaders[0].state_dict()
    counts = Counter(key for keys in seen for key in keys)
    assert counts == Counter((epoch, number, 0) for epoch in range(2) for number in range(count))
    assert changed or seen == whole


def test_ranks_get_different_rows_that_make_up_the_global_batch() -> None:
    budget = Budget(128, 192, segments=16, merge=2)
    one = next(iter(_loaders(1, 60, budget, packs=4)[0]))
    four = [next(iter(loader)) for loader in _loaders(4, 60, budget, packs=4)]
    rows = [tuple(row["input_ids"].flatten().tolist()) for step in four for row in step.micro_batches]
    assert Counter(rows) == Counter(tuple(row["input_ids"].flatten().tolist()) for row in one.micro_batches)


def test_iterating_again_goes_on_and_the_epochs_differ_in_order() -> None:
    budget = Budget(128, 192, segments=16, merge=2)
    loader = _loaders(1, 30, budget, packs=2, epochs=2)[0]
    first = next(iter(loader))
    rest = list(loader)
    assert [step.step for step in (first, *rest)] == list(range(1, len(rest) + 2))
    assert list(loader) == []
    stream = loader._planner.stream
    assert [stream.at(p)[1] for p in range(30)] != [stream.at(p)[1] for p in range(30, 60)]


def test_split_samples_come_whole_and_in_order_after_an_interruption() -> None:
    data = [{"text": f"{n} {length}"} for n, length in enumerate((10, 100, 7, 64, 5, 33))]

    def loader() -> PackedLoader:
        return make_loader(
            data, encode, dense_model(), Budget(34, segments=8), packs=1, epochs=1, over_long="split", look_ahead=3
        )

    seen, state = [], None
    while True:
        now = loader()
        if state is not None:
            now.load_state_dict(state)
        step = next(iter(now), None)
        if step is None:
            break
        seen += step.keys
        state = now.state_dict()
    parts = {1: 4, 3: 2}  # a row of 34 tokens has one of padding
    assert sorted(seen) == [(0, n, part) for n in range(6) for part in range(parts.get(n, 1))]


def test_rows_without_a_target_are_left_out_where_no_other_rank_waits() -> None:
    data = [{"text": f"{n} {60}"} for n in range(4)]

    def masked(sample: Any) -> dict[str, Any]:
        given = encode(sample)
        return given | {"labels": [-100] * 60 if sample.text.startswith("1 ") else given["input_ids"]}

    def rows(ranks: int) -> list[int]:
        loaders = [
            make_loader(data, masked, dense_model(), Budget(64), packs=2, epochs=1, data_rank=rank, data_ranks=ranks)
            for rank in range(ranks)
        ]
        return [len(step.micro_batches) for loader in loaders for step in loader]

    assert sum(rows(1)) == 3 and sum(rows(2)) == 4


def test_a_state_of_other_data_is_refused() -> None:
    budget = Budget(128, 192, segments=16, merge=2)
    loader = _loaders(1, 30, budget, packs=2)[0]
    next(iter(loader))
    for other in (_loaders(1, 31, budget, packs=2)[0], _loaders(1, 30, budget, packs=2, seed=1)[0]):
        with pytest.raises(InputError, match="belongs to other data"):
            other.load_state_dict(loader.state_dict())
    small = _loaders(1, 30, Budget(90, 16, segments=16, merge=2), packs=2)[0]
    with pytest.raises(InputError, match="read ahead under another budget"):
        small.load_state_dict(loader.state_dict())


def test_workers_give_the_same_steps() -> None:
    budget = Budget(128, 192, segments=16, merge=2)
    plain, workers = (_loaders(1, 40, budget, packs=2, epochs=1, workers=n)[0] for n in (0, 2))
    for a, b in zip(plain, workers, strict=True):
        assert a.keys == b.keys
        for x, y in zip(a.micro_batches, b.micro_batches, strict=True):
            assert x.keys() == y.keys() and all((x[k] == y[k]).all() for k in x)


class _Counted(Records):
    """Counts what is read."""

    def __init__(self, count: int) -> None:
        super().__init__(records(count))
        self.reads: Counter[int] = Counter()

    def __getitem__(self, index: int) -> Any:
        self.reads[index] += 1
        return super().__getitem__(index)


def _measured_in_turns(rank: int, world: int) -> tuple[list[Any], list[int], str]:
    import torch.distributed as dist

    source = _Counted(60)
    loader = make_loader(
        source, encode, vision_language_model(), Budget(128, 192, segments=16, merge=2), packs=2, data_rank=rank,
        data_ranks=world, epochs=1, group=dist.group.WORLD, look_ahead=16,
    )  # fmt: skip
    keys = [step.keys for step in loader]
    refused = ""
    bad = [{"text": f"{n} {-1 if n == 5 else 9}"} for n in range(8)]
    try:
        list(make_loader(bad, encode, dense_model(), Budget(64), packs=2, data_rank=rank, data_ranks=world, epochs=1,
                         group=dist.group.WORLD))  # fmt: skip
    except InputError as error:
        refused = str(error)
    return keys, [source.reads[n] for n in range(60)], refused


@pytest.mark.slow
def test_ranks_measure_in_turns_and_refuse_together() -> None:
    (keys, reads, refused), (other_keys, other_reads, other_refused) = run_ranks(_measured_in_turns, 2)
    assert keys == other_keys and sorted(key[1] for step in keys for key in step) == list(range(60))
    assert max(sum(reads), sum(other_reads)) < 60  # neither rank reads everything: half to measure, and what is its own
    assert refused == other_refused and "its length is negative" in refused
