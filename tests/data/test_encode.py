"""The model's own processor or tokenizer encodes; targets are the assistant's turns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from tiny_models import vision_language_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ProcessorMixin, Qwen2VLImageProcessorPil

from omnicompile.data import BadSample, Budget, Encoded, ProcessorEncoder, Sample, make_loader
from omnicompile.data.split import split
from omnicompile.errors import InputError

WORDS = [
    "describe",
    "it",
    "a",
    "red",
    "box",
    "yes",
    "no",
    "what",
    "is",
    "this",
    "user",
    "assistant",
    "the",
    "end",
    "of",
    "one",
    "two",
    "three",
]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }} {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<vs><img><ve>{% else %}{{ p['text'] }}{% endif %}"
    "{% endfor %}{% endif %}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant {% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<vs>", "<ve>"]
IMAGE = 120  # of `vision_language_model`


def tokenizer() -> Any:
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    vocabulary |= {"<img>": IMAGE, "<vid>": 121, "<unk>": 119}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", chat_template=TEMPLATE,
        additional_special_tokens=[*SPECIAL[1:], "<img>", "<vid>"],
    )  # fmt: skip
    fast.image_token, fast.video_token = "<img>", "<vid>"
    fast.image_token_id, fast.video_token_id = IMAGE, 121
    return fast


class ImageProcessor(ProcessorMixin):
    """A processor for images of any size, without the video side of its model's own, which needs torchvision."""

    return_mm_token_type_ids = True

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:
        self.image_token, self.image_token_id = "<img>", IMAGE
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **_: Any) -> str:
        tokens = image_inputs["image_grid_thw"][image_idx].prod() // self.image_processor.merge_size**2
        return self.image_token * int(tokens)


def processor() -> Any:
    size = {"shortest_edge": 64, "longest_edge": 4096}
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=size)
    return ImageProcessor(images, tokenizer(), chat_template=TEMPLATE)


CHAT = (
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this"}]},
    {"role": "assistant", "content": "a red box"},
    {"role": "user", "content": "yes"},
    {"role": "assistant", "content": "no end"},
)


def _words(ids: torch.Tensor) -> list[str]:
    return tokenizer().convert_ids_to_tokens(ids.tolist())


def test_targets_are_the_turns_of_the_assistant() -> None:
    text = [{**m, "content": m["content"] if isinstance(m["content"], str) else "what is this"} for m in CHAT]
    encoded = Encoded.of(ProcessorEncoder(tokenizer())(Sample(messages=tuple(text))))
    assert _words(encoded.labels[encoded.labels >= 0]) == ["a", "red", "box", "</s>", "no", "end", "</s>"]
    everything = Encoded.of(ProcessorEncoder(tokenizer(), train_on="all")(Sample(messages=tuple(text))))
    assert torch.equal(everything.labels, everything.ids) and torch.equal(everything.ids, encoded.ids)


def test_a_processor_encodes_images_among_the_turns() -> None:
    sample = Sample(messages=CHAT, images=(Image.new("RGB", (32, 24), (200, 0, 0)),))
    encoded = Encoded.of(ProcessorEncoder(processor())(sample))
    assert encoded.features["image_grid_thw"].tolist() == [[1, 6, 8]]
    assert int((encoded.ids == IMAGE).sum()) == 12 == int((encoded.kinds == 1).sum())
    assert _words(encoded.labels[encoded.labels >= 0]) == ["a", "red", "box", "</s>", "no", "end", "</s>"]
    assert encoded.size.patches == 48 and encoded.size.images == (48,) and encoded.size.squares == 48**2


def test_plain_text_trains_on_every_token_but_placeholders() -> None:
    sample = Sample(text="the <vs><img><ve> end", images=(Image.new("RGB", (16, 16)),))
    encoded = Encoded.of(ProcessorEncoder(processor())(sample))
    assert _words(encoded.labels[encoded.labels >= 0]) == ["the", "<vs>", "<ve>", "end"]


def test_a_processor_s_samples_train_the_model() -> None:
    box = Image.new("RGB", (32, 24), (200, 0, 0))
    rows = [{"messages": list(CHAT), "images": [box]}, {"messages": list(CHAT[2:]), "images": []}] * 4
    loader = make_loader(rows, processor(), vision_language_model(), Budget(96, 96, merge=2), packs=2, epochs=1)
    step = next(iter(loader))
    assert step.samples == 8 or len(list(loader)) > 0
    loss = vision_language_model()(**step.micro_batches[0]).loss
    assert torch.isfinite(loss)


@pytest.mark.parametrize(
    ("sample", "error", "message"),
    [
        (Sample(messages=CHAT[:1], images=(Image.new("RGB", (16, 16)),)), BadSample, "no turn of the assistant"),
        (Sample(text="a <img> b <img>", images=(Image.new("RGB", (16, 16)),)), BadSample, "the processor refuses it"),
        (Sample(text="a", images=(b"broken",)), BadSample, "cannot be read"),
    ],
)
def test_samples_that_cannot_be_encoded_are_bad(sample: Sample, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ProcessorEncoder(processor())(sample)


def test_a_tokenizer_alone_does_not_drop_images() -> None:
    with pytest.raises(InputError, match="give a processor"):
        ProcessorEncoder(tokenizer())(Sample(text="a", images=(Image.new("RGB", (16, 16)),)))


def test_templates_that_hide_earlier_turns_are_refused() -> None:
    made = tokenizer()
    made.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(InputError, match="cannot be told"):
        ProcessorEncoder(made)(Sample(messages=CHAT[1:]))
    made.chat_template = None
    with pytest.raises(InputError, match="need a chat template"):
        ProcessorEncoder(made)(Sample(messages=CHAT[1:]))


def test_what_an_encoder_gives_is_checked() -> None:
    for given, reason in (
        ({"labels": [1]}, "no `input_ids`"),
        ({"input_ids": [[1, 2], [3, 4]]}, "not one integer per token"),
        ({"input_ids": [1, 2], "labels": [1]}, "not one integer per token"),
        ({"input_ids": [1], "attention_mask": [0]}, "no tokens"),
    ):
        with pytest.raises(BadSample, match=reason):
            Encoded.of(given)
    kept = Encoded.of({"input_ids": [[0, 5, 6]], "attention_mask": [[0, 1, 1]]})
    assert kept.ids.tolist() == [5, 6]


def test_splitting_cuts_between_tokens_and_never_in_an_image() -> None:
    from samples import encode

    whole = Encoded.of(encode(Sample(text="1 70", images=(2, 4, 3))))
    budget = Budget(48, 64, segments=4, merge=2)
    parts = split(whole, budget)
    assert all(budget.holds(part.size) for part in parts) and len(parts) > 3
    assert torch.equal(torch.cat([part.ids for part in parts]), whole.ids)
    for name, value in whole.features.items():
        assert torch.equal(torch.cat([part.features[name] for part in parts if name in part.features]), value)
    for part in parts:
        assert int((part.kinds == 1).sum()) * 4 == part.size.patches
    with pytest.raises(BadSample, match="one image of it is over the budget: 64 patches"):
        split(whole, Budget(80, 32, segments=4, merge=2))
