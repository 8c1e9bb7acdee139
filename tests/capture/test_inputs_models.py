"""Example inputs of models at their published widths (few layers): the forward gives a scalar loss, and there are
as many placeholders as each model's documented merging says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from omnicompile.capture.inputs import ExampleInputs, FloatSpec, InputRequest, Rows, input_constraints, make_inputs
from omnicompile.capture.inputs.probe import observe

transformers = pytest.importorskip("transformers")

SEQ_LEN = 2000
ROPE = {"rope_type": "default", "rope_theta": 1e6}


@dataclass(frozen=True)
class Case:
    """grid: patches of each image (height, width). frames: per clip. image_tokens / clip_tokens: expected counts."""

    model: Any
    config: Any
    grid: tuple[int, int] | None = None
    frames: int = 0
    image_tokens: int = 0
    clip_tokens: int = 0
    rows: Rows = Rows.SAMPLES
    seq_len: int = SEQ_LEN


def _text(hidden: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        **more,
    }


def qwen2_vl() -> Case:
    text = _text(3584, 28, 4, 152064, rope_parameters={**ROPE, "mrope_section": [16, 24, 24]})
    vision = {"depth": 2, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "mlp_ratio": 4}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    return Case(transformers.Qwen2VLForConditionalGeneration, config, grid=(20, 28), image_tokens=140)


def qwen2_5_vl() -> Case:
    text = _text(3584, 28, 4, 152064, rope_parameters={**ROPE, "mrope_section": [16, 24, 24]})
    vision = {
        "depth": 3,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    }
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return Case(transformers.Qwen2_5_VLForConditionalGeneration, config, grid=(20, 28), image_tokens=140)


def _qwen3_vision(hidden: int) -> dict[str, Any]:
    return {
        "depth": 4,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "out_hidden_size": hidden,
        "patch_size": 16,
        "deepstack_visual_indexes": [0, 1, 2],
    }


ROPE3 = {**ROPE, "mrope_section": [24, 20, 20], "mrope_interleaved": True}


def qwen3_vl() -> Case:
    text = _text(4096, 32, 8, 151936, head_dim=128, rope_parameters=ROPE3)
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=_qwen3_vision(4096))
    return Case(transformers.Qwen3VLForConditionalGeneration, config, grid=(20, 28), image_tokens=140)


MOE = {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "head_dim": 128}


def qwen3_vl_moe() -> Case:
    text = _text(2048, 32, 4, 151936, rope_parameters=ROPE3, **MOE)
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=_qwen3_vision(2048))
    return Case(transformers.Qwen3VLMoeForConditionalGeneration, config, grid=(20, 28), image_tokens=140)


def qwen2_5_omni() -> Case:
    text = _text(3584, 28, 4, 152064, rope_parameters={**ROPE, "mrope_section": [16, 24, 24]})
    vision = {"depth": 2, "out_hidden_size": 3584, "fullatt_block_indexes": [1]}
    audio = {"encoder_layers": 2, "output_dim": 3584}
    config = transformers.Qwen2_5OmniThinkerConfig(
        text_config=text, vision_config=vision, audio_config=audio, vision_start_token_id=151652
    )
    model = transformers.Qwen2_5OmniThinkerForConditionalGeneration
    return Case(model, config, grid=(20, 28), frames=600, image_tokens=140, clip_tokens=150)


def qwen3_omni() -> Case:
    text = _text(2048, 32, 4, 152064, rope_parameters=ROPE3, **MOE)
    audio = {"encoder_layers": 2, "output_dim": 2048}
    config = transformers.Qwen3OmniMoeThinkerConfig(
        text_config=text,
        vision_config=_qwen3_vision(2048),
        audio_config=audio,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
    )
    model = transformers.Qwen3OmniMoeThinkerForConditionalGeneration
    return Case(model, config, grid=(20, 28), frames=600, image_tokens=140, clip_tokens=78)


def qwen3_moe() -> Case:
    config = transformers.Qwen3MoeConfig(**_text(2048, 32, 4, 151936, **MOE))
    return Case(transformers.Qwen3MoeForCausalLM, config)


def deepseek_v3() -> Case:
    config = transformers.DeepseekV3Config(num_hidden_layers=4)
    return Case(transformers.DeepseekV3ForCausalLM, config)


def llama() -> Case:
    return Case(transformers.LlamaForCausalLM, transformers.LlamaConfig(**_text(4096, 32, 8, 128256)))


def janus() -> Case:
    text = _text(4096, 32, 32, 102400)
    vision = {"hidden_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 16, "projection_dim": 4096}
    quantizer = {"embed_dim": 8, "num_embeddings": 16384, "projection_dim": 4096, "image_token_embed_dim": 4096}
    config = transformers.JanusConfig(text_config=text, vision_config=vision, vq_config=quantizer)
    return Case(transformers.JanusForConditionalGeneration, config, image_tokens=576)


def emu3() -> Case:
    vocabulary = {f"<|visual token {i:06d}|>": 151854 + i for i in range(32768)}
    vocabulary |= {"<|extra_200|>": 151846, "<image>": 151850, "<|image token|>": 151851}
    text = _text(4096, 32, 8, 184622)
    config = transformers.Emu3Config(text_config=text, vocabulary_map=vocabulary)
    # An 8 x 8-pixel code each, and an end-of-line token per row of codes.
    return Case(transformers.Emu3ForConditionalGeneration, config, grid=(8, 12), image_tokens=16 * 25)


def whisper() -> Case:
    config = transformers.WhisperConfig(
        vocab_size=51866, num_mel_bins=128, encoder_layers=2, decoder_layers=2, d_model=1280,
        encoder_attention_heads=20, decoder_attention_heads=20,
    )  # fmt: skip
    return Case(transformers.WhisperForConditionalGeneration, config, rows=Rows.CLIPS, seq_len=448)


def siglip() -> Case:
    tower = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 2, "num_attention_heads": 16}
    config = transformers.SiglipConfig(text_config=tower, vision_config={**tower, "image_size": 384, "patch_size": 14})
    return Case(transformers.SiglipModel, config, rows=Rows.IMAGES, seq_len=64)


CASES = [qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe, qwen2_5_omni, qwen3_omni, qwen3_moe, deepseek_v3, llama]
CASES += [janus, emu3, whisper, siglip]


def _make(case: Case, images: int, clips: int) -> tuple[torch.nn.Module, ExampleInputs]:
    with torch.device("meta"):
        model = case.model(case.config)
    limits = input_constraints(model)
    assert limits.rows is case.rows
    request = InputRequest(
        seq_len=case.seq_len,
        images=images if limits.images else 0,
        image_grid=case.grid,
        clips=clips if limits.audio else 0,
        audio_frames=case.frames or None,
    )
    return model, make_inputs(model, request)


@pytest.mark.parametrize("build", CASES, ids=lambda f: f.__name__)
def test_forward_with_made_inputs_gives_a_scalar_loss(build: Any) -> None:
    case = build()
    model, made = _make(case, images=2, clips=3)
    assert (made.tokens_per_image, made.tokens_per_clip) == (case.image_tokens, case.clip_tokens)
    seen = observe(model, made.kwargs, made.host, made.seq_len, whole=True)
    assert seen.error is None
    assert seen.loss_dim == 0


def test_placeholders_are_in_the_text_and_not_in_the_labels() -> None:
    model, made = _make(qwen2_5_omni(), images=2, clips=3)
    ids, labels = made.kwargs["input_ids"], made.kwargs["labels"]
    assert (ids == model.config.image_token_id).sum() == 2 * 140
    assert (ids == model.config.audio_token_id).sum() == 3 * 150
    assert (labels == -100).sum() == 2 * 140 + 3 * 150
    assert bool((labels[labels != -100] == ids[labels != -100]).all())


def test_only_metadata_is_host_and_features_exist_by_shape_only() -> None:
    _, made = _make(qwen2_vl(), images=2, clips=0)
    assert made.host == {"image_grid_thw", "mm_token_type_ids"}
    assert made.kwargs["image_grid_thw"].tolist() == [[1, 20, 28]] * 2
    assert made.kwargs["pixel_values"] == FloatSpec((2 * 560, 1176), torch.float32)
    assert made.kwargs["position_ids"].shape == (3, 1, SEQ_LEN)


def test_making_inputs_leaves_the_model_as_it_was() -> None:
    case = qwen2_vl()
    with torch.device("meta"):
        model = case.model(case.config)
    before = {name: dict(m.__dict__) for name, m in model.named_modules()}
    make_inputs(model, InputRequest(SEQ_LEN, images=1, image_grid=(4, 4)))
    assert model.training
    for name, module in model.named_modules():
        public = {k for k in module.__dict__ if not k.startswith("_")}
        assert public == {k for k in before[name] if not k.startswith("_")}
    assert all(p.is_meta for p in model.parameters())
