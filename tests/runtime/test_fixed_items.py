"""Items of fixed size and clips are filled up to the budget, also where a batch has none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from omnicompile.errors import InputError
from omnicompile.runtime.budget import Budget

IMAGE, SIDE = 100, 16


def janus() -> nn.Module:
    from transformers import JanusConfig, JanusForConditionalGeneration

    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": SIDE, "patch_size": 4,
              "projection_dim": 32, "mlp_ratio": 2, "num_image_tokens": 16}  # fmt: skip
    vq = {"base_channels": 32, "channel_multiplier": [1, 1], "num_embeddings": 8, "embed_dim": 4, "latent_channels": 32,
          "num_res_blocks": 1, "num_patches": 4, "projection_dim": 32, "image_token_embed_dim": 32}  # fmt: skip
    text = {"model_type": "llama", "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 1, "num_attention_heads": 4}  # fmt: skip
    torch.manual_seed(0)
    config = JanusConfig(text_config=text, vision_config=vision, vq_config=vq, image_token_id=IMAGE)
    return JanusForConditionalGeneration(config).float().train()


def batch(images: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, IMAGE, (1, length), generator=generator)
    labels = ids.clone()
    for i in range(images):
        ids[0, 2 + 18 * i : 18 + 18 * i] = IMAGE
        labels[0, 2 + 18 * i : 18 + 18 * i] = -100
    found = {"input_ids": ids, "labels": labels}
    return found | ({"pixel_values": torch.randn(images, 3, SIDE, SIDE, generator=generator)} if images else {})


@pytest.mark.parametrize("images", [0, 1, 2])
def test_a_filled_batch_has_the_budget_s_items_and_the_same_loss(images: int) -> None:
    model = janus()
    budget = Budget.of(model, batch(2, 64))
    given = batch(images, 28 if images < 2 else 64, seed=1)
    filled = budget.fill(given).batch
    assert filled["input_ids"].shape == (1, 64) and filled["pixel_values"].shape == (2, 3, SIDE, SIDE)
    assert int((filled["input_ids"] == IMAGE).sum()) == 32
    torch.testing.assert_close(model(**filled).loss, model(**given).loss)


def test_more_items_or_no_room_are_refused() -> None:
    budget = Budget.of(janus(), batch(1, 40))
    with pytest.raises(InputError, match="2 items in pixel_values, the budget 1"):
        budget.fill(batch(2, 40))
    with pytest.raises(InputError, match="whose 17 tokens do not fit into the 5 left"):
        budget.fill(batch(0, 35))
