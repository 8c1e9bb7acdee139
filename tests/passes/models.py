"""Tiny models with batches, for parity tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from omnicompile.plan import BlockPlan, Layout, Mesh, Sharding

IMAGE, VIDEO = 120, 121


def vision_language_model(layers: int = 2, **text_options: Any) -> nn.Module:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers, "use_cache": False,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    } | text_options  # fmt: skip
    vision = {
        "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=122, vision_end_token_id=123, tie_word_embeddings=False,
    )  # fmt: skip
    return _build(Qwen2VLForConditionalGeneration, config)


def windowed_model(layers: int = 2) -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers, "use_cache": False,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4, "out_hidden_size": 32,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16, "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=122, vision_end_token_id=123, tie_word_embeddings=False,
    )  # fmt: skip
    return _build(Qwen2_5_VLForConditionalGeneration, config)


def stacked_mixture_vl_model(layers: int = 2) -> nn.Module:
    """Vision-language mixture of experts whose vision features are also added to early text layers."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    text = {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers, "use_cache": False,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4, "out_hidden_size": 32,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "deepstack_visual_indexes": [0, 1],
        "num_position_embeddings": 64,
    }  # fmt: skip
    config = Qwen3VLMoeConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=122, vision_end_token_id=123, tie_word_embeddings=False,
    )  # fmt: skip
    return _build(Qwen3VLMoeForConditionalGeneration, config)


def mixture_model(layers: int = 2, aux: bool = False, tied: bool = False) -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        decoder_sparse_step=1, max_position_embeddings=256, use_cache=False, tie_word_embeddings=tied,
        output_router_logits=aux, router_aux_loss_coef=0.1,
    )  # fmt: skip
    return _build(Qwen3MoeForCausalLM, config)


def latent_mixture_model(layers: int = 2) -> nn.Module:
    """Latent attention (keys and values of different head sizes), grouped sigmoid router, shared experts."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=128, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, n_shared_experts=1, n_routed_experts=8, kv_lora_rank=16,
        q_lora_rank=16, qk_rope_head_dim=8, v_head_dim=8, qk_nope_head_dim=8, n_group=4, topk_group=2,
        num_experts_per_tok=2, first_k_dense_replace=1, max_position_embeddings=256, use_cache=False,
    )  # fmt: skip
    return _build(DeepseekV3ForCausalLM, config)


def dense_model(layers: int = 2, tied: bool = False, kv_heads: int = 2) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=256, use_cache=False, tie_word_embeddings=tied,
    )  # fmt: skip
    return _build(LlamaForCausalLM, config)


def _build(kind: Any, config: Any) -> nn.Module:
    torch.manual_seed(0)
    model = kind(config).float().train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def text_batch(seed: int, length: int = 64, rows: int = 1, vocab: int = 100) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, : 2 + seed % 5] = -100  # so that ranks have different numbers of targets
    return {"input_ids": ids, "labels": labels}


def image_batch(
    seed: int, grids: list[tuple[int, int, int]], length: int = 64, kinds: bool = True
) -> dict[str, Tensor]:
    """A row of text with an image for each grid (t, h, w in patches) in it."""
    batch = text_batch(seed, length)
    ids, types, position = batch["input_ids"], torch.zeros(1, length, dtype=torch.int), 4
    for t, h, w in grids:
        tokens = t * h * w // 4
        ids[0, position : position + tokens] = IMAGE
        types[0, position : position + tokens] = 1
        position += tokens + 3
    batch["labels"] = torch.where(ids == IMAGE, -100, batch["labels"])
    generator = torch.Generator().manual_seed(seed + 1000)
    patches = sum(t * h * w for t, h, w in grids)
    batch |= {"image_grid_thw": torch.tensor(grids), "pixel_values": torch.randn(patches, 96, generator=generator)}
    return batch | ({"mm_token_type_ids": types} if kinds else {})


def image_batches(count: int) -> list[dict[str, Tensor]]:
    """One batch per data rank, with different image grids of the same total."""
    grids = [[(1, 4, 4), (1, 8, 4)], [(1, 8, 4), (1, 4, 4)], [(1, 4, 12)], [(1, 4, 4), (1, 4, 4), (1, 4, 4)]]
    return [image_batch(seed, grids[seed % len(grids)]) for seed in range(count)]  # type: ignore[arg-type]


def block_plans(
    mesh: Mesh, sharding: Sharding = Sharding.FSDP, vision: Layout | None = None, vision_name: str = "visual"
) -> dict[str, BlockPlan]:
    """The text block cut along its sequence; the vision block, if any, in the given layout."""
    layout = Layout.SEQUENCE if mesh.sp > 1 else Layout.BATCH
    blocks = {"text": BlockPlan(sharding=sharding, layout=layout, sp=mesh.sp, ep=mesh.ep)}
    if vision is not None:
        blocks[vision_name] = BlockPlan(sharding=sharding, layout=vision, sp=mesh.sp)
    return blocks
