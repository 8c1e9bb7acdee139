"""Images of fixed size, clips of sound and videos are packed to a number of them, and rows with fewer are filled up."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from fixed_models import ITEM, KINDS, records
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_plan, reference_gradients, run_ranks, worst_error
from torch import Tensor, nn

import omnicompile
from omnicompile.data import Budget, Encoded, ItemBudget, ItemTokens, Sample, Size, make_loader, suggest_budget
from omnicompile.data.packing import Item, best_fit
from omnicompile.data.split import split
from omnicompile.errors import InputError
from omnicompile.plan import Layout, Mesh
from omnicompile.runtime.budget import Budget as RowBudget

SAMPLES, FEW = 24, 12  # every how many samples have an item, so that some rows have none


def budget_of(kind: str, count: int = 2) -> Budget:
    return Budget(96, frames=64, segments=16, items=(ItemBudget(KINDS[kind].name, count, KINDS[kind].tokens),))


def sample_of(record: dict[str, Any]) -> Sample:
    return Sample(text=record["text"], images=tuple(record["images"]))


SIZES = st.builds(
    lambda text, images, clips: Size(
        text + images * 9 + clips * 4, (), clips * 10, clips, (("pixel_values", images), ("input_features", clips))
    ),
    st.integers(0, 40), st.integers(0, 3), st.integers(0, 2),
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(st.lists(SIZES, min_size=1, max_size=30), st.integers(3, 6), st.integers(2, 4))
def test_dummies_for_what_a_pack_lacks_always_fit(sizes: list[Size], images: int, clips: int) -> None:
    items = (ItemBudget("pixel_values", images, 9), ItemBudget("input_features", clips, 4))
    budget = Budget(160, frames=clips * 10, segments=32, items=items)
    sizes = [size for size in sizes if size.tokens]
    buffer = [Item((0, n, 0), size) for n, size in enumerate(sizes) if budget.holds(size)]
    seen = []
    while buffer:
        pack = best_fit(buffer, budget)
        buffer = [item for item in buffer if item not in pack]
        seen += pack
        have = {item.name: sum(i.size.count(item.name) for i in pack) for item in items}
        assert all(have[item.name] <= item.count for item in items)
        dummies = sum((item.count - have[item.name]) * (item.tokens + 1) for item in items)
        assert sum(i.size.tokens for i in pack) + 1 + dummies <= budget.tokens
    assert len(seen) == sum(budget.holds(size) for size in sizes)


def test_a_row_of_real_items_wastes_no_token() -> None:
    budget = Budget(96, items=(ItemBudget("pixel_values", 3, 16),))
    assert budget.holds(Size(95, items=(("pixel_values", 3),)))
    assert not budget.holds(Size(96, items=(("pixel_values", 3),)))
    assert budget.holds(Size(96 - 1 - 3 * 17)) and not budget.holds(Size(96 - 3 * 17))


def test_what_does_not_fit_is_said_in_words() -> None:
    size = Size(40, items=(("pixel_values", 3),))
    assert "3 images (at most 2)" in budget_of("images").excess(size)
    assert "3 images (at most 0)" in Budget(96).excess(size) and not Budget(96).holds(size)
    with pytest.raises(InputError, match=r"nothing for text beside 6 images \(102 tokens\)"):
        budget_of("images", 6)
    assert Size.from_list(size.to_list()) == size and Size.from_list([5, [4], 0, 0]) == Size(5, (4,))


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_is_found_for_the_mix(kind: str) -> None:
    one, model = KINDS[kind], KINDS[kind].build()
    known = ItemTokens(model)
    sizes = [s.size for s in known.watched(Encoded.of(one.encode(sample_of(r))) for r in records(60))]
    assert known.found == {one.name: one.tokens}
    budget = suggest_budget(sizes, 512, items=known.found)
    (item,) = budget.items
    per_token = sum(s.count(one.name) for s in sizes) / sum(s.tokens for s in sizes)
    assert item.count == pytest.approx(512 * per_token, abs=1.5) and item.word == one.word
    fills = [
        step.fill
        for step in make_loader(records(600), one.encode, model, budget, packs=4, epochs=1)
    ][:-2]  # fmt: skip
    assert min(fill["tokens"] for fill in fills) > 0.85 and min(fill[one.word] for fill in fills) > 0.8


def test_items_of_different_sizes_are_counted_and_not_made_up() -> None:
    known = ItemTokens(KINDS["images"].build())
    wide = Encoded.of({"input_ids": [1, ITEM, ITEM], "pixel_values": torch.zeros(1, 3, 16, 32)})
    list(known.watched([wide, Encoded.of(KINDS["images"].encode(Sample(text="1 9", images=(0,))))]))
    assert known.found == {"pixel_values": 0}
    sized = {"input_ids": [1, ITEM], "pixel_values": torch.zeros(1, 3, 16, 16), "image_sizes": torch.ones(1, 2).int()}
    known = ItemTokens(KINDS["images"].build())
    list(known.watched([Encoded.of(sized)]))
    assert known.found == {"pixel_values": 0}
    masked = {"input_ids": [1, ITEM, ITEM], "input_features": torch.zeros(1, 8, 32), "mask": torch.ones(1, 32).int()}
    known = ItemTokens(KINDS["sound"].build())
    list(known.watched([Encoded.of(masked)]))
    assert known.found == {}
    budget = Budget(96, items=(ItemBudget("pixel_values", 2),))
    assert budget.text == 95 and budget.holds(wide.size)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_fill_up_to_one_shape_and_keep_their_loss(kind: str) -> None:
    one, model = KINDS[kind], KINDS[kind].build()
    loader = make_loader(records(SAMPLES, FEW), one.encode, model, budget_of(kind), packs=4, epochs=1)
    example = loader.example_batch()
    filling = RowBudget.of(model, example)
    counts = set()
    for step in islice(loader, 1):
        for row in step.micro_batches:
            counts.add(len(row.get(one.name, ())))
            filled = filling.fill(row).batch
            assert {k: v.shape for k, v in filled.items()} == {k: v.shape for k, v in example.items()}
            assert int((filled["input_ids"] == ITEM).sum()) == 2 * one.tokens
            with torch.no_grad():
                torch.testing.assert_close(model(**filled).loss, model(**row).loss)
    assert 0 in counts and max(counts) > 0


def test_an_epoch_s_fill_counts_real_items_only() -> None:
    one = KINDS["images"]
    loader = make_loader(records(SAMPLES), one.encode, one.build(), budget_of("images"), packs=2, epochs=1)
    steps = list(loader)
    rows = sum(len(step.micro_batches) for step in steps)
    real = sum(len(record["images"]) for record in records(SAMPLES))
    shares = [step.fill["images"] * len(step.micro_batches) for step in steps]
    assert sum(shares) == pytest.approx(real / 2) and real / 2 < rows


def test_samples_with_items_are_not_split() -> None:
    whole = Encoded.of(KINDS["images"].encode(Sample(text="1 90", images=(0, 0))))
    with pytest.raises(Exception, match="cannot be split: it has pixel_values"):
        split(whole, budget_of("images"))


def test_a_budget_of_items_that_no_sample_has_is_refused() -> None:
    one = KINDS["sound"]
    loader = make_loader(records(3, every=100)[1:], one.encode, one.build(), budget_of("sound"), packs=1)
    with pytest.raises(InputError, match="the budget has 2 clips, but no sample has any"):
        loader.example_batch()


def _step(rank: int, world: int, kind: str, mesh: Mesh) -> tuple[float, dict[str, Tensor], list[Any], list[int]]:
    one, model = KINDS[kind], KINDS[kind].build()
    loader = make_loader(
        records(SAMPLES, FEW), one.encode, model, budget_of(kind), packs=4, data_rank=rank // mesh.sp,
        data_ranks=mesh.data_ranks, group=torch.distributed.group.WORLD, epochs=1,
    )  # fmt: skip
    plan = make_plan(("text", one.block), mesh)
    if mesh.sp > 1:
        plan.blocks[one.block] = replace(plan.blocks[one.block], layout=Layout.BATCH, sp=1)
    module = omnicompile.parallelize(model, plan, "cpu", example_batch=loader.example_batch(), segments=16)
    step = next(iter(loader))
    targets, total = module.count_targets(step.micro_batches), 0.0
    for number, batch in enumerate(step.micro_batches):
        with module.accumulate(last=number == len(step.micro_batches) - 1, targets=targets):
            loss = module(**batch).loss
            loss.backward()
        total += loss.item()
    gradients = {name: module.full_gradient(name) for name, _ in module.named_parameters()}
    gradients = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    return total, gradients, list(step.keys), [len(b.get(one.name, ())) for b in step.micro_batches]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mesh"), [*((kind, Mesh(dp_shard=2)) for kind in KINDS), ("images", Mesh(sp=2)), ("sound", Mesh(sp=2))]
)
def test_a_packed_step_of_two_ranks_is_that_of_its_samples_one_by_one(kind: str, mesh: Mesh) -> None:
    one = KINDS[kind]
    found = run_ranks(_step, 2, kind, mesh)
    assert found[0][2] == found[1][2] and len(found[0][2]) > 6
    data = records(SAMPLES, FEW)
    samples = [Encoded.of(one.encode(sample_of(data[n]))) for _, n, _ in found[0][2]]
    batches: list[dict[str, Tensor]] = [
        {"input_ids": s.ids[None], "labels": s.labels[None], **s.features} for s in samples
    ]
    model: nn.Module = one.build()
    loss, gradients = reference_gradients(model, batches)
    assert abs(found[0][0] - loss) < 1e-5 and found[0][0] == found[1][0]
    assert worst_error(found[0][1], {n: g for n, g in gradients.items() if n in found[0][1]}) < 1e-4
    assert found[0][1].keys() == gradients.keys()
    counts = [count for _, _, _, own in found for count in own]
    assert 0 in counts and max(counts) > 0  # a rank without any beside one that has some
