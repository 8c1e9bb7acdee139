"""A tiny Voxtral with a processor that belongs to it, and sounds to train it on: an encoder like Whisper's, whose clips
have one length. `omnicompile train` reads build() and processor()."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import ProcessorMixin, VoxtralConfig, VoxtralForConditionalGeneration

PITCHES = {"low": 300.0, "middle": 900.0, "high": 2700.0}
WORDS = ("what", "is", "this", "sound", "the", "a", "one", "two", "three", "many", "few", "yes", "no")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|audio_pad|>", "<unk>")
VOCABULARY = [*SPECIAL, "user", "assistant", *PITCHES, *WORDS]
RATE, HOP, FRAMES, BANDS = 16_000, 500, 32, 8
TOKENS = FRAMES // 8
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'audio' %} <|audio_pad|> {% else %} {{ p['text'] }}{% endif %}"
    "{% endfor %}{% endif %} <|im_end|> {% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def build() -> nn.Module:
    audio = {
        "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_mel_bins": BANDS, "max_source_positions": FRAMES // 2,
    }  # fmt: skip
    text = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "use_cache": False,
    }  # fmt: skip
    config = VoxtralConfig(audio_config=audio, text_config=text, audio_token_id=VOCABULARY.index("<|audio_pad|>"))
    return VoxtralForConditionalGeneration(config).float()


class SoundProcessor(ProcessorMixin):
    """Text, and clips of half a second at most a second, each cut or filled up to one length."""

    def __init__(self, feature_extractor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.audio_token = "<|audio_pad|>"
        self.audio_token_id = tokenizer.convert_tokens_to_ids(self.audio_token)
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)

    def replace_audio_token(self, audio_inputs: dict[str, Any], audio_idx: int, **_: Any) -> str:
        return " ".join([self.audio_token] * TOKENS)


def processor() -> SoundProcessor:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

    numbers = {word: number for number, word in enumerate(VOCABULARY)}
    words = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<|endoftext|>", eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL[1:4]), chat_template=TEMPLATE,
    )  # fmt: skip
    features = WhisperFeatureExtractor(
        feature_size=BANDS, sampling_rate=RATE, hop_length=HOP, chunk_length=1, n_fft=1024
    )
    return SoundProcessor(features, tokenizer, chat_template=TEMPLATE)


def make_data(folder: Path, count: int) -> Path:
    """`count` conversations in train.jsonl, two of five about a sound, the others without one."""
    import soundfile

    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "train.jsonl", "w", encoding="utf-8") as file:
        for number in range(count):
            question = " ".join(draw.choice(WORDS) for _ in range(draw.randint(3, 14)))
            parts: list[dict[str, str]] = [{"type": "text", "text": question}]
            answer, sounds = " ".join(question.split()[-2:]), []
            if number % 5 < 2:
                answer = draw.choice(sorted(PITCHES))
                wave = np.sin(2 * np.pi * PITCHES[answer] * np.arange(RATE * draw.uniform(0.5, 1.2)) / RATE)
                sounds = [f"{number}.wav"]
                soundfile.write(folder / sounds[0], 0.5 * wave, RATE)
                parts.insert(0, {"type": "audio"})
            turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns, "audio": sounds}) + "\n")
    return folder / "train.jsonl"
