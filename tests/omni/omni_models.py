"""Tiny omni models, a tokenizer for them, and batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from omnicompile import omni
from omnicompile.omni import Item, OmniModel, OmniProcessor, Text

EXAMPLES = Path(__file__).parents[2] / "examples" / "omni"
MODELS = ("janus_tiny", "llama_omni_tiny", "qwen3_moe_omni_tiny")
WORDS = ("<pad>", "<bos>", "<eos>", "a", "red", "blue", "what", "is", "this", "draw", "sound", "of")


def tiny(name: str) -> OmniModel:
    torch.manual_seed(0)
    return omni.build(EXAMPLES / f"{name}.yaml").float()


def tokenizer(special: dict[str, int]) -> PreTrainedTokenizerFast:
    """Of whole words, with the special tokens at their ids."""
    vocabulary = {word: number for number, word in enumerate(WORDS)} | special
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def processor(model: OmniModel) -> OmniProcessor:
    return OmniProcessor(model, tokenizer(model.config.special_tokens or {}))


def image(model: OmniModel, generator: torch.Generator, side: int = 16) -> Tensor:
    return torch.randn(3, side, side, generator=generator)


def samples(model: OmniModel, seed: int, read: bool = True, produced: bool = True, heard: bool = True) -> list[Any]:
    """A picture that is read, a sound where the model hears, and a picture that is produced."""
    generator = torch.Generator().manual_seed(seed)
    found: list[list[Text | Item]] = [[Text("<bos> what is this a red sound <eos>"[: 20 + seed % 5])]]
    if read:
        found.append([Text("<bos> this is", False), Item("image", image(model, generator)), Text("a blue <eos>")])
    if heard and "audio" in model.config.encoders:
        sound = torch.randn(model.encoder("audio").item_shape, generator=generator)
        found.append([Text("<bos> sound of", False), Item("audio", sound), Text("red <eos>")])
    if produced:
        drawn = torch.randn(model.decoder("image").item_shape, generator=generator)
        found.append([Text("<bos> draw a red", False), Item("image", drawn, produced=True), Text("<eos>")])
    return found


def batch(model: OmniModel, seed: int, **kinds: bool) -> dict[str, Tensor]:
    return processor(model)(samples(model, seed, **kinds))
