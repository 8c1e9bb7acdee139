"""A tiny Qwen2-VL with the processor that belongs to it, to try `omnicompile train` with: nothing is downloaded.

    python examples/train/make_data.py data
    omnicompile train examples/train/recipe.yaml --data data/train.jsonl --out run
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import ProcessorMixin, Qwen2VLConfig, Qwen2VLForConditionalGeneration

COLORS = {
    "red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "yellow": (230, 210, 50),
    "black": (20, 20, 20), "white": (240, 240, 240),
}  # fmt: skip
WORDS = (
    "the", "a", "of", "and", "to", "in", "is", "it", "on", "as", "with", "for", "was", "at", "by", "this", "that",
    "from", "one", "two", "three", "many", "few", "small", "large",
)  # fmt: skip
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
VOCABULARY = [*SPECIAL, "<|video_pad|>", "<unk>", "user", "assistant", *COLORS, *WORDS]
PATCH, MERGE = 4, 2
TEMPLATE = """\
{%- for message in messages -%}
<|im_start|> {{ message['role'] }}
{%- if message['content'] is string %} {{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' %} <|vision_start|><|image_pad|><|vision_end|>
{%- else %} {{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif %} <|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|> assistant
{%- endif -%}
"""


def build() -> nn.Module:
    text = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "use_cache": False,
        "bos_token_id": VOCABULARY.index("<|im_start|>"), "eos_token_id": VOCABULARY.index("<|im_end|>"),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 4]},
    }  # fmt: skip
    vision = {
        "depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2, "patch_size": PATCH,
        "spatial_merge_size": MERGE, "temporal_patch_size": 2,
    }  # fmt: skip
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=VOCABULARY.index("<|image_pad|>"),
        video_token_id=VOCABULARY.index("<|video_pad|>"), vision_start_token_id=VOCABULARY.index("<|vision_start|>"),
        vision_end_token_id=VOCABULARY.index("<|vision_end|>"), tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen2VLForConditionalGeneration(config).float()


class ImageTextProcessor(ProcessorMixin):
    """As Qwen2VLProcessor, without video, for which transformers needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token = "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **options: Any) -> str:
        return self.image_token * int(image_inputs["image_grid_thw"][image_idx].prod() // MERGE**2)


def processor() -> ImageTextProcessor:
    """A tokenizer of whole words, and images of at most 40 x 40 pixels."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessorPil

    numbers = {word: number for number, word in enumerate(VOCABULARY)}
    words = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<|endoftext|>", eos_token="<|im_end|>",
        additional_special_tokens=list(VOCABULARY[1:7]), chat_template=TEMPLATE,
    )  # fmt: skip
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH, temporal_patch_size=2, merge_size=MERGE, min_pixels=8 * 8, max_pixels=40 * 40
    )
    return ImageTextProcessor(images, tokenizer, chat_template=TEMPLATE)
