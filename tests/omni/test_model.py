"""Composition: what the forward computes, saving, freezing, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from omni_models import EXAMPLES, MODELS, batch, processor, samples, tiny, tokenizer

from omnicompile import omni
from omnicompile.errors import InputError
from omnicompile.omni import Item, OmniModel, Text
from omnicompile.runtime.plain_module import PlainModule


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_what_the_parts_give_one_after_the_other(name: str) -> None:
    model, given = tiny(name), batch(tiny(name), 0)
    output = model(**given)
    ids, labels = given["input_ids"], given["labels"]
    embeds = model.get_input_embeddings()(ids)
    for part in model.config.encoders:
        grid = given.get(f"{part}_grid_thw")
        made = model.encoder(part).lm_encode(given[f"{part}_values"], grid)
        embeds[ids == model.config.encoder(part).token_id] = made
    decoder, places = model.decoder("image"), ids == model.config.decoder("image").token_id
    made, codes = decoder.lm_encode(given["output_image_values"])
    embeds[places] = made
    hidden = model.foundation.model(
        inputs_embeds=embeds, position_ids=given["position_ids"], use_cache=False
    ).last_hidden_state
    logits = model.foundation.lm_head(hidden)
    text = labels.masked_fill(places, -100)
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())
    torch.testing.assert_close(output.losses["text"], want)
    before = torch.where(places[0])[0] - 1
    drawn = F.cross_entropy(decoder.head(hidden[0, before]), codes)
    torch.testing.assert_close(output.losses["image"], drawn)
    torch.testing.assert_close(output.loss, want + drawn)


def test_codes_may_be_given_instead_of_values() -> None:
    model = tiny("janus_tiny")
    given = batch(model, 0)
    codes = model.decoder("image").tokenize(given["output_image_values"])
    want = model(**given).loss
    del given["output_image_values"]
    torch.testing.assert_close(model(**given, output_image_ids=codes).loss, want)


def test_an_item_without_labels_is_no_target() -> None:
    model = tiny("janus_tiny")
    given = batch(model, 0)
    given["labels"] = given["labels"].masked_fill(given["labels"] == model.config.decoder("image").token_id, -100)
    output = model(**given)
    assert output.losses["image"].item() == 0.0
    output.loss.backward()
    assert not model.decoder("image").head[0].weight.grad.any()


def test_losses_are_summed_by_their_weights(tmp_path: Path) -> None:
    file = tmp_path / "weighted.yaml"
    own = {
        "extends": str(EXAMPLES / "janus_tiny.yaml"),
        "text_loss_weight": 0.5,
        "decoders": {"image": {"loss_weight": 3}},
    }
    file.write_text(yaml.safe_dump(own))
    torch.manual_seed(0)
    model = omni.build(file)
    output = model(**batch(model, 0))
    torch.testing.assert_close(output.loss, 0.5 * output.losses["text"] + 3 * output.losses["image"])


@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded_as_one_model(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    model.save_pretrained(tmp_path)
    loaded = OmniModel.from_pretrained(tmp_path)
    given = batch(model, 1)
    assert torch.equal(loaded.train()(**given).loss, model.train()(**given).loss)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, p in loaded.named_parameters() if not p.requires_grad}
    assert frozen and all(n.startswith(("decoder_image.tower.", "encoder_audio.tower.embed_pos")) for n in frozen)


def test_a_frozen_tower_keeps_its_statistics() -> None:
    model = tiny("llama_omni_tiny").train()
    before = {n: b.clone() for n, b in model.named_buffers()}
    model(**batch(model, 0))
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


def test_a_video_is_an_item_of_several_frames() -> None:
    model = tiny("llama_omni_tiny")
    video = torch.randn(4, 3, 16, 16)
    given = processor(model)([[Text("what is"), Item("image", video), Text("a red")]])
    assert given["image_grid_thw"].tolist() == [[2, 4, 4]]
    assert int((given["input_ids"] == model.config.encoder("image").token_id).sum()) == 2 * 4
    assert model(**given).loss.isfinite()


def test_patches_are_those_of_the_model_s_own_processor() -> None:
    from transformers import Qwen2VLImageProcessorPil

    own = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, do_resize=False, do_rescale=False, do_normalize=False
    )
    picture = torch.rand(3, 16, 24)
    want = own(picture.numpy(), input_data_format="channels_first", return_tensors="pt")
    patches, grid = omni.processor.patchify(picture, {"patch": 4, "merge": 2, "temporal": 2}, "image")
    assert torch.equal(grid, want["image_grid_thw"])
    torch.testing.assert_close(patches, want["pixel_values"])


def written(tmp_path: Path, **own: object) -> Path:
    file = tmp_path / "model.yaml"
    file.write_text(yaml.safe_dump({"extends": str(EXAMPLES / "janus_tiny.yaml"), **own}))
    return file


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"encoders": {"image": {"class": "SiglipVisonModel"}}}, "no class SiglipVisonModel"),
        ({"encoders": {"image": {"class": "torch.nn.Linear"}}}, "not a PreTrainedModel"),
        ({"encoders": {"image": {"config": {"hidden_sise": 4}}}}, "no field hidden_sise"),
        ({"encoders": {"image": {"projektor": "mlp"}}}, "did you mean projector"),
        ({"encoders": {"image": {"projector": "mpl"}}}, "must be one of mlp, linear, none"),
        ({"encoders": {"image": {"projector": "none", "width": 64}}}, "width 64 do not match the language model's 32"),
        ({"encoders": {"image": {"width": "hiden_size"}}}, "'hiden_size' in 'hiden_size' is neither"),
        ({"encoders": {"image": {"token": "<img>"}}}, "special_tokens gives no id for <img>"),
        ({"encoders": {"image": {"freeze": "yes"}}}, "freeze must be all, tower or none"),
        ({"encoders": {"depth": {"class": "ViTModel"}}}, "token is missing"),
        ({"special_tokens": {"<image>": 4000}}, "token_id is 4000, but the language model has 128 tokens"),
        ({"foundation": {"model_type": "lama"}}, "foundation lama"),
        ({"foundation": None}, "foundation is missing"),
        ({"decoders": {"image": {"kind": "collections.OrderedDict"}}}, "has no lm_encode"),
    ],
)
def test_a_wrong_declaration_is_one_clear_error(tmp_path: Path, own: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        omni.build(written(tmp_path, **own))


def test_wrong_inputs_are_clear_errors(tmp_path: Path) -> None:
    model = tiny("janus_tiny")
    given = batch(model, 0)
    with pytest.raises(InputError, match="no encoder for 'sound', only for image: add it to the encoders"):
        model(**given, sound_values=torch.zeros(1))
    with pytest.raises(InputError, match="no decoder for 'sound', only for image: add it to the decoders"):
        model(**given, output_sound_ids=torch.zeros(1))
    with pytest.raises(
        InputError, match="no part of this model takes pixels; it takes image_values, output_image_values"
    ):
        model(**given, pixels=torch.zeros(1))
    with pytest.raises(InputError, match="17 placeholders of image, and its items make 16"):
        model(**{**given, "input_ids": given["input_ids"].index_fill(1, torch.tensor([0]), 120)})
    with pytest.raises(InputError, match="no decoder for 'sound', only for image"):
        processor(model)([[Item("sound", torch.zeros(4), produced=True)]])
    with pytest.raises(InputError, match=r"has shape \[3, 8, 8\], the model takes \[3, 16, 16\]"):
        processor(model)([[Item("image", torch.zeros(3, 8, 8))]])
    wide = omni.build(written(tmp_path, encoders={"image": {"width": 40}}))
    with pytest.raises(InputError, match="features are 32 wide, the projector takes 40"):
        wide(**given)


def test_special_tokens_come_from_the_tokenizer_and_must_be_in_it() -> None:
    file, special = EXAMPLES / "janus_tiny.yaml", tiny("janus_tiny").config.special_tokens
    moved = {token: number - 20 for token, number in special.items()}
    assert omni.read_config(file, tokenizer(moved)).encoder("image").token_id == moved["<image>"]
    with pytest.raises(InputError, match="the tokenizer has no token <image>"):
        omni.read_config(file, tokenizer({t: n for t, n in special.items() if t != "<image>"}))
    model = tiny("janus_tiny")
    with pytest.raises(InputError, match=r"the model's id of <image> is 120, and the tokenizer has 100"):
        omni.OmniProcessor(model, tokenizer(moved))


@pytest.mark.parametrize("name", MODELS)
def test_samples_in_a_row_do_not_see_each_other(name: str) -> None:
    model = tiny(name)
    parts = samples(model, 0)
    module = PlainModule(model)
    targets = module.count_targets([processor(model)([part]) for part in parts])
    losses = {"text": 0.0, "image": 0.0}
    for part in parts:
        with module.accumulate(last=True, targets=targets):
            found = module(**processor(model)([part])).losses
        losses = {n: v + (found[n].item() if n in found else 0.0) for n, v in losses.items()}
    together = model(**processor(model)(parts)).losses
    for loss, value in losses.items():
        assert value == pytest.approx(together[loss].item(), rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_processor_is_saved_beside_its_model(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    process = processor(model)
    model.save_pretrained(tmp_path)
    process.save_pretrained(tmp_path)
    for loaded in (omni.OmniProcessor.from_pretrained(tmp_path), omni.OmniProcessor.from_pretrained(tmp_path, model)):
        want, got = process(samples(model, 1)), loaded(samples(model, 1))
        assert got.keys() == want.keys() and all(torch.equal(got[key], value) for key, value in want.items())
    again = OmniModel.from_pretrained(tmp_path)
    assert torch.equal(again(**got).loss, model(**want).loss)


def test_a_folder_without_the_model_s_tokenizer_is_refused(tmp_path: Path) -> None:
    model = tiny("janus_tiny")
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="holds no tokenizer"):
        omni.OmniProcessor.from_pretrained(tmp_path)
    tokenizer({token: n - 20 for token, n in model.config.special_tokens.items()}).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="the model's id of <image> is 120, and the tokenizer has 100"):
        omni.OmniProcessor.from_pretrained(tmp_path)


def test_samples_that_are_read_and_produced_in_any_order() -> None:
    model = tiny("llama_omni_tiny")
    parts = samples(model, 0)
    forward, backward = processor(model)(parts), processor(model)(list(reversed(parts)))
    assert sorted(forward["input_ids"][0].tolist()) == sorted(backward["input_ids"][0].tolist())
    assert forward["labels"].ne(-100).sum() == backward["labels"].ne(-100).sum()
    assert model(**backward).loss.isfinite()


def test_micro_steps_of_one_process_add_up_to_the_joined_batch() -> None:
    model = tiny("janus_tiny")
    module = PlainModule(model)
    micro = [batch(model, 0), batch(model, 1, produced=False)]
    targets = module.count_targets(micro)
    drawn = 16  # codes, all in the first micro-batch
    counts = [int((b["labels"][:, 1:] != -100).sum()) for b in micro]
    assert targets.by_loss == (sum(counts) - drawn, drawn)
    total = 0.0
    for given in micro:
        with module.accumulate(last=True, targets=targets):
            total += module(**given).loss
    first, second = model(**micro[0]).losses, model(**micro[1]).losses
    text = (first["text"] * (counts[0] - drawn) + second["text"] * counts[1]) / (sum(counts) - drawn)
    torch.testing.assert_close(total, text + first["image"])
    with module.accumulate(last=True, targets=5), pytest.raises(InputError, match="several losses"):
        module(**micro[0])
