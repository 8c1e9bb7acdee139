"""A packed row gives the losses of its samples alone: in the plain model, through the anchors, and distributed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from samples import encode, records
from tiny_models import (
    dense_model,
    image_batch,
    make_plan,
    mixture_model,
    reference_gradients,
    run_ranks,
    text_batch,
    vision_language_model,
    worst_error,
)
from torch import Tensor, nn
from transformers.masking_utils import (
    and_masks,
    blockwise_overlay,
    causal_mask_function,
    or_masks,
    packed_sequence_compatibility_function,
    sliding_window_causal_mask_function,
)

import omnicompile
from omnicompile.anchors.huggingface import anchored
from omnicompile.anchors.masks import anchor_mask, segment_bounds
from omnicompile.data import Budget, Encoded, Sample, make_loader
from omnicompile.data.assemble import Assembler
from omnicompile.errors import InputError
from omnicompile.plan import Layout, Mesh

POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
BUDGET = Budget(tokens=128, patches=192, segments=16, merge=2)


def _mask(function: Callable[..., Tensor], rows: int = 1) -> Tensor | None:
    sizes: dict[str, Any] = {"batch_size": rows, "q_length": 8, "kv_length": 8}
    return anchor_mask(**sizes, mask_function=function, allow_is_causal_skip=False)


def test_a_packed_mask_is_handed_on_as_bounds() -> None:
    mask = _mask(packed_sequence_compatibility_function(causal_mask_function, POSITIONS, SEGMENTS))
    assert mask is not None and mask.tolist() == [0, 3, 8] and mask.dtype == torch.int32


def test_a_window_within_packed_segments_is_handed_on_as_bounds() -> None:
    packed = packed_sequence_compatibility_function(sliding_window_causal_mask_function(2), POSITIONS, SEGMENTS)
    bounds = segment_bounds(packed, 8, 2)
    assert bounds is not None and bounds.tolist() == [0, 3, 8]
    assert segment_bounds(packed, 8, None) is None and segment_bounds(packed, 8, 3) is None


def test_masks_that_are_more_than_segments_stay_whole() -> None:
    packed = packed_sequence_compatibility_function(causal_mask_function, POSITIONS, SEGMENTS)
    blocks = or_masks(packed, blockwise_overlay(torch.tensor([[-1, -1, -1, -1, 0, 0, -1, -1]])))
    holes = and_masks(packed, lambda b, h, q, k: (q - k) != 3)
    for function in (blocks, holes):
        assert segment_bounds(function, 8, None) is None
        mask = _mask(function)
        assert mask is not None and mask.shape == (1, 1, 8, 8)
    whole = _mask(or_masks(causal_mask_function, blockwise_overlay(torch.full((1, 8), -1))))
    assert whole is not None and whole.shape == (1, 1, 8, 8)  # a batch whose rows have no block, of a model with blocks
    two = _mask(causal_mask_function, rows=2)
    assert two is not None and two.shape == (2, 1, 8, 8)


def _alone(model: nn.Module, samples: list[dict[str, Tensor]]) -> float:
    counts = [int((sample["labels"][:, 1:] != -100).sum()) for sample in samples]
    return sum(float(model(**s).loss) * n for s, n in zip(samples, counts)) / sum(counts)


TEXTS = [text_batch(seed, length) for seed, length in ((1, 9), (2, 14), (3, 30))]
MIXED = [image_batch(1, [(1, 4, 8)], 30), text_batch(2, 11), image_batch(3, [(1, 4, 4), (1, 8, 4)], 34)]


def window_model() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=5, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return MistralForCausalLM(config).float().train()


@pytest.mark.parametrize(
    ("build", "samples"),
    [(vision_language_model, MIXED), (dense_model, TEXTS), (mixture_model, TEXTS), (window_model, TEXTS)],
)
def test_a_packed_row_has_the_loss_of_its_samples_alone(
    build: Callable[[], nn.Module], samples: list[dict[str, Tensor]]
) -> None:
    model = build()
    row = Assembler.of(model).row([Encoded.of(sample) for sample in samples])
    with torch.no_grad():
        want = _alone(model, samples)
        assert abs(float(model(**row).loss) - want) < 1e-5
        with anchored(model):  # by bounds of segments instead of a mask
            assert abs(float(model(**row).loss) - want) < 1e-5


def test_samples_of_a_row_do_not_see_each_other() -> None:
    model = vision_language_model()
    assembler, rest = Assembler.of(model), [Encoded.of(sample) for sample in MIXED[1:]]
    first = [Encoded.of(image_batch(seed, [(1, 4, 8)], 30)) for seed in (1, 7)]
    with torch.no_grad(), anchored(model):
        a, b = (model(**assembler.row([one, *rest])).logits for one in first)
    assert torch.equal(a[:, 30:], b[:, 30:]) and not torch.equal(a[:, :30], b[:, :30])


def test_no_target_crosses_samples_and_the_padding_has_none() -> None:
    row = Assembler.of(dense_model()).row([Encoded.of({"input_ids": [5, 6, 7]}), Encoded.of({"input_ids": [8, 9]})])
    assert row["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0]]
    assert row["labels"].tolist() == [[-100, 6, 7, -100, 9, -100]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0]]


def test_models_that_cannot_keep_samples_apart_are_refused() -> None:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM, ViTConfig, ViTModel

    with pytest.raises(InputError, match="takes no position_ids"), torch.device("meta"):
        Assembler.of(
            ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
        )
    config = Qwen3NextConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8,
        shared_expert_intermediate_size=8, linear_num_value_heads=2, linear_num_key_heads=1, linear_key_head_dim=8,
        linear_value_head_dim=8,
    )  # fmt: skip
    with pytest.raises(InputError, match="carry a state"), torch.device("meta"):
        Assembler.of(Qwen3NextForCausalLM(config))


def test_features_that_the_model_does_not_take_are_refused() -> None:
    with pytest.raises(InputError, match="gives pixel_values, which LlamaForCausalLM does not take"):
        Assembler.of(dense_model()).row([Encoded.of({"input_ids": [1], "pixel_values": torch.zeros(4, 2)})])


def _packed_step(
    rank: int, world: int, sp: int, layout: Layout
) -> tuple[float, dict[str, Tensor], list[tuple[int, ...]]]:
    model = vision_language_model()
    budget = replace(BUDGET, parts=sp if layout is Layout.IMAGES else 1)
    loader = make_loader(
        records(40), encode, model, budget, packs=2, data_rank=rank // sp, data_ranks=world // sp,
        group=torch.distributed.group.WORLD,
    )  # fmt: skip
    plan = make_plan(("text", "vision"), Mesh(dp_shard=world // sp, sp=sp))
    plan.blocks["vision"] = replace(plan.blocks["vision"], layout=layout)
    example = loader.example_batch()
    module = omnicompile.parallelize(model, plan, "cpu", example_batch=example, segments=BUDGET.segments)
    step = next(iter(loader))
    targets = module.count_targets(step.micro_batches)
    total = 0.0
    for number, batch in enumerate(step.micro_batches):
        with module.accumulate(last=number == len(step.micro_batches) - 1, targets=targets):
            loss = module(**batch).loss
            loss.backward()
        total += loss.item()
    gradients = {name: module.full_gradient(name) for name, _ in module.named_parameters()}
    return total, gradients, list(step.keys)


@pytest.mark.slow
@pytest.mark.parametrize(("sp", "layout"), [(1, Layout.BATCH), (2, Layout.SEQUENCE), (2, Layout.IMAGES)])
def test_a_packed_step_of_two_ranks_is_that_of_its_samples_one_by_one(sp: int, layout: Layout) -> None:
    found = run_ranks(_packed_step, 2, sp, layout)
    assert found[0][2] == found[1][2] and len(found[0][2]) > 6
    data = records(40)
    given = [encode(Sample(text=data[n]["text"], images=tuple(data[n]["images"]))) for _, n, _ in found[0][2]]
    samples = [Encoded.of(one) for one in given]
    batches: list[dict[str, Tensor]] = [
        {"input_ids": s.ids[None], "labels": s.labels[None], "mm_token_type_ids": s.kinds[None], **s.features}
        for s in samples
    ]
    batches = [b if "pixel_values" in b else {k: b[k] for k in ("input_ids", "labels")} for b in batches]
    loss, gradients = reference_gradients(vision_language_model(), batches)
    assert abs(found[0][0] - loss) < 1e-5 and found[0][0] == found[1][0]
    assert worst_error(found[0][1], gradients) < 1e-4
