"""Packs fit their budget, are full, and cost alike; policies refuse, split or count."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import encode, records
from tiny_models import dense_model, vision_language_model

from omnicompile.data import (
    Budget,
    Policy,
    Size,
    attention_weights,
    make_loader,
    open_source,
    sample_sizes,
    suggest_budget,
)
from omnicompile.data.balance import Weights, attention_cost, deal, deal_in_order, exchange
from omnicompile.data.packing import Item, Pack, best_fit, fill, greedy
from omnicompile.errors import InputError
from omnicompile.runtime.packing import pack as pack_images

BUDGET = Budget(tokens=512, patches=512, segments=24, merge=2)
SIZES = st.builds(
    lambda text, images: Size(text + 4 * sum(images), tuple(16 * i for i in images)),
    st.integers(1, 200),
    st.lists(st.integers(1, 8), max_size=3),
)


def _items(sizes: list[Size]) -> list[Item]:
    return [Item((0, number, 0), size) for number, size in enumerate(sizes)]


def _fits(pack: Pack, budget: Budget) -> bool:
    totals = np.sum([budget.needs(item.size) for item in pack], axis=0) if pack else np.zeros(len(budget.room))
    return bool((totals <= np.array(budget.room)).all())


def _packed(items: list[Item], budget: Budget, look_ahead: int) -> list[Pack]:
    packs, buffer, rest = [], items[:look_ahead], items[look_ahead:]
    while buffer:
        packs.append(best_fit(buffer, budget))
        taken = {item.key for item in packs[-1]}
        buffer = [item for item in buffer if item.key not in taken]
        more = look_ahead - len(buffer)
        buffer, rest = buffer + rest[:more], rest[more:]
    return packs


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(SIZES, min_size=1, max_size=60), look_ahead=st.integers(1, 40))
def test_packs_hold_every_item_once_within_the_budget_the_oldest_first(sizes: list[Size], look_ahead: int) -> None:
    items = _items(sizes)
    packs = _packed(items, BUDGET, look_ahead)
    assert Counter(item.key for pack in packs for item in pack) == Counter(item.key for item in items)
    waiting = [item.key for item in items]
    for pack in packs:
        assert _fits(pack, BUDGET) and pack[0].key == waiting[0]
        assert [item.key for item in pack] == sorted(item.key for item in pack)
        waiting = [key for key in waiting if key not in {item.key for item in pack}]


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(SIZES, min_size=1, max_size=40))
def test_whatever_fits_leaves_room_for_its_padding(sizes: list[Size]) -> None:
    """The dummy image takes a token for every merge^2 patches that are missing, and one before it."""
    for pack in _packed(_items(sizes), BUDGET, 20):
        tokens, patches = sum(i.size.tokens for i in pack) + 1, sum(i.size.patches for i in pack)
        missing = BUDGET.patches - patches
        assert missing >= 0 and tokens + (missing // 4 + 1 if missing else 0) <= BUDGET.tokens


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(SIZES, min_size=1, max_size=40))
def test_images_of_every_pack_can_be_dealt_out_to_ranks(sizes: list[Size]) -> None:
    budget = Budget(tokens=512, patches=512, segments=24, merge=2, parts=2)
    items = _items([size for size in sizes if budget.holds(size)])
    packs = _packed(items, budget, 20)
    for one in (packs, exchange(packs, Weights(), budget)):
        assert Counter(item.key for pack in one for item in pack) == Counter(item.key for item in items)
        assert all(pack_images([n for i in pack for n in i.size.images], 2, 256) is not None for pack in one)


def test_an_image_larger_than_a_rank_s_part_is_over_the_budget() -> None:
    budget = Budget(tokens=512, patches=512, segments=24, merge=2, parts=2)
    assert budget.holds(Size(100, (256,))) and not budget.holds(Size(100, (272,)))
    assert "cannot be dealt out to 2 ranks" in budget.excess(Size(100, (272,)))
    assert suggest_budget([Size(100, (272,)), Size(300)], 512, merge=2, parts=2).patches == 544


def _mix(count: int) -> list[Size]:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        images = [int(n) for n in rng.integers(1, 8, rng.integers(0, 3))]
        text = int(np.clip(rng.lognormal(3.4, 0.8), 4, 200))
        found.append(Size(text + 4 * sum(images), tuple(16 * i for i in images)))
    return found


def test_best_fit_with_the_suggested_budget_beats_greedy_packing() -> None:
    sizes = _mix(1500)
    budget = suggest_budget(sizes, 512, merge=2)
    packs, plain = _packed(_items(sizes), budget, 128)[:-5], greedy(_items(sizes), budget)
    assert all(_fits(pack, budget) for pack in (*packs, *plain))
    found, other = fill(packs, budget), fill(plain, budget)
    assert min(found["tokens"], found["patches"]) > 0.96 > 0.9 > max(other["tokens"], other["patches"])


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(SIZES, min_size=1, max_size=60), ranks=st.sampled_from([1, 2, 4]))
def test_balancing_keeps_the_items_and_lowers_the_costliest_pack(sizes: list[Size], ranks: int) -> None:
    weights = Weights(3, 1)
    packs = _packed(_items(sizes), BUDGET, 30)
    packs += [[] for _ in range(-len(packs) % ranks)]
    evened = exchange(packs, weights, BUDGET)
    dealt = deal(evened, ranks, weights, BUDGET)
    flat = [pack for mine in dealt for pack in mine]
    assert Counter(i.key for pack in flat for i in pack) == Counter(i.key for pack in packs for i in pack)
    assert all(_fits(pack, BUDGET) for pack in flat) and len({len(mine) for mine in dealt}) == 1
    again = deal(exchange(packs, weights, BUDGET), ranks, weights, BUDGET)
    assert again == dealt


def test_balancing_makes_the_slowest_rank_faster() -> None:
    weights, sizes = Weights(), _mix(500)
    budget = suggest_budget(sizes, 512, merge=2)
    packs = _packed(_items(sizes), budget, 128)

    def slowest(dealt: list[list[Pack]]) -> int:
        return sum(
            max(attention_cost(mine[micro], weights, budget) for mine in dealt) for micro in range(len(dealt[0]))
        )

    before = after = 0
    for start in range(0, len(packs) - 8, 8):
        step = packs[start : start + 8]
        before += slowest(deal_in_order(step, 4))
        after += slowest(deal(exchange(step, weights, budget), 4, weights, budget))
    assert after < 0.95 * before


def test_weights_follow_the_sizes_of_the_stacks() -> None:
    assert attention_weights(vision_language_model()) == (2 * 32, 2 * 32)
    assert attention_weights(dense_model(3)) == (3 * 32, 0)
    assert Weights.of(64 * 8192, 32 * 1280) == Weights(1024, 80)


def test_suggest_budget_follows_the_mix() -> None:
    budget = suggest_budget([Size(64, (64,)), Size(32)] * 10, 480, merge=2)
    assert budget.patches // 4 * 96 == pytest.approx(16 * 478, rel=0.05)  # 16 of 96 tokens are placeholders
    assert suggest_budget([Size(10)], 100).patches == 0
    assert suggest_budget([Size(10), Size(50, (160,))], 100, merge=2).patches >= 160
    with pytest.raises(InputError, match="got none"):
        suggest_budget([], 100)
    with pytest.raises(InputError, match="1 of 2 samples do not fit into 100 tokens"):
        suggest_budget([Size(10), Size(101)], 100)


def test_sizes_of_a_source_are_measured_all_over_it() -> None:
    source = open_source([{"text": f"{n} {-1 if n == 4 else n + 1}"} for n in range(8)])
    assert [size.tokens for size in sample_sizes(source, encode, 4, Policy.SKIP)] == [1, 3, 7]
    with pytest.raises(InputError, match=r"records\[4\]: its length is negative"):
        sample_sizes(source, encode, 4)


def test_budgets_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="not a multiple of 4"):
        Budget(64, 18, merge=2)
    with pytest.raises(InputError, match="leaves nothing for text"):
        Budget(64, 256, merge=2)


def _loader(data: list[dict[str, Any]], **options: Any) -> Any:
    return make_loader(data, encode, dense_model(), Budget(64), packs=2, epochs=1, **options)


def test_a_sample_over_the_budget_is_refused_or_counted(caplog: pytest.LogCaptureFixture) -> None:
    data = [{"text": f"{n} {80 if n == 3 else 20}"} for n in range(6)]
    with pytest.raises(InputError, match=r"records\[3\]: the sample is over the budget: 80 tokens beside its images"):
        list(_loader(data))
    with caplog.at_level(logging.WARNING, "omnicompile.data"):
        loader = _loader(data, over_long="skip")
        keys = [key for step in loader for key in step.keys]
    assert sorted(key[1] for key in keys) == [0, 1, 2, 4, 5] and loader.skipped == {"over_long": 1, "bad": 0}
    assert "skipped records[3]" in caplog.text


def test_a_bad_sample_is_refused_or_counted() -> None:
    data = [{"text": f"{n} {-1 if n % 3 == 1 else 20}"} for n in range(6)]
    with pytest.raises(InputError, match=r"its length is negative; mend or remove it, or skip"):
        list(_loader(data))
    loader = _loader(data, bad="skip")
    assert sum(step.samples for step in loader) == 4 and loader.skipped["bad"] == 2
    with pytest.raises(InputError, match="all 1 samples of an epoch were skipped"):
        list(_loader([{"text": "0 -1"}], bad="skip"))


def test_a_failing_encoder_and_changing_sizes_are_refused() -> None:
    data = [{"text": "0 9"}, {"text": "no number"}]
    with pytest.raises(InputError, match=r"records\[1\]: the encoder failed: ValueError"):
        list(_loader(data))
    sizes = iter(range(5, 50))

    def changing(_: Any) -> dict[str, Any]:
        return {"input_ids": [1] * next(sizes)}

    loader = make_loader([{"text": "a"}] * 3, changing, dense_model(), Budget(64), packs=1)
    loader._cache._limit = 0
    with pytest.raises(InputError, match="encoded to another size"):
        next(iter(loader))


def test_arguments_that_do_not_go_together_are_refused() -> None:
    for options, message in (
        ({"data_ranks": 3}, "2 packs a step cannot be dealt out to 3 data ranks"),
        ({"data_rank": 1}, "cannot be dealt out"),
        ({"bad": "split"}, "bad must be one of refuse, skip"),
        ({"over_long": "cut"}, "over_long must be one of refuse, split, skip"),
        ({"look_ahead": 0}, "look_ahead 0"),
    ):
        with pytest.raises(InputError, match=message):
            _loader([{"text": "0 9"}], **options)
    with pytest.raises(InputError, match="the encoder is a int"):
        make_loader([{"text": "a"}], 3, dense_model(), Budget(64), packs=1)
    with pytest.raises(InputError, match="no sample has images"):
        make_loader(
            records(3, images=False), encode, vision_language_model(), Budget(128, 64, merge=2), packs=1
        ).example_batch()
