"""Generation predicts, token by token, what the forward predicts at every place at once."""

from __future__ import annotations

import pytest
import torch
from omni_models import MODELS, batch, processor, tiny
from tiny_models import make_plan, run_ranks
from torch import Tensor

import omnicompile
from omnicompile import omni
from omnicompile.errors import InputError
from omnicompile.omni import Item, OmniModel, Text
from omnicompile.plan import Mesh


def prompt(model: OmniModel, rows: int = 1) -> Tensor:
    ids = processor(model)([[Text("<bos> draw a red")]])["input_ids"]
    start = torch.tensor([[model.config.decoder("image").start_token_id]])
    return torch.cat([ids, start], 1).expand(rows, -1)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_generated_is_what_the_forward_predicts(name: str) -> None:
    model = tiny(name).eval()
    ids, count = prompt(model), model.decoder("image").item_tokens
    got = model.generate(ids, max_new_tokens=count + 4)
    token, (codes,) = model.config.decoder("image").token_id, got.codes["image"][0]
    whole = got.ids[:, :-1] if got.ids[0, -1] == 2 else got.ids
    given = {"input_ids": whole, "labels": whole, "output_image_ids": codes[None]}
    with torch.no_grad():
        output = model(**given)
        places = torch.where(whole[0] == token)[0]
        predicted = model.decoder("image").lm_head(output.hidden_states[0, places - 1])[0].argmax(-1)
    assert len(places) == count and torch.equal(predicted, codes)
    banned = [part.config.token_id for part in model.parts().values()]
    logits = output.logits[0].index_fill(1, torch.tensor(banned), float("-inf"))
    first = int(places[-1]) + 1
    assert whole[0, first] == model.config.decoder("image").end_token_id
    assert torch.equal(logits.argmax(-1)[first : whole.shape[1] - 1], whole[0, first + 1 :])
    (picture,) = got.items["image"][0]
    assert torch.equal(picture, model.decoder("image").lm_generate(codes[None])[0].detach())
    assert picture.shape == model.decoder("image").item_shape


def test_text_after_a_picture_that_is_read_and_rows_of_their_own() -> None:
    model = tiny("llama_omni_tiny").eval()
    pictures = torch.randn(2, 3, 16, 16)
    alone = []
    for picture in pictures:
        given = processor(model)([[Text("<bos> what is"), Item("image", picture)]])
        given.pop("labels")
        alone.append(model.generate(**given, max_new_tokens=6).ids)
    both = {k: torch.cat([g[k] for g in [one(model, p) for p in pictures]]) for k in one(model, pictures[0])}
    together = model.generate(**both, max_new_tokens=6).ids
    for row, want in zip(together, alone):
        assert torch.equal(row[: want.shape[1]], want[0])


def one(model: OmniModel, picture: Tensor) -> dict[str, Tensor]:
    given = processor(model)([[Text("<bos> what is"), Item("image", picture)]])
    given.pop("labels")
    return given


def test_sampling_goes_by_the_seed_and_items_must_be_whole() -> None:
    model = tiny("janus_tiny").eval()
    torch.manual_seed(3)
    first = model.generate(prompt(model, 2), max_new_tokens=17, temperature=1.0)
    torch.manual_seed(3)
    assert torch.equal(first.ids, model.generate(prompt(model, 2), max_new_tokens=17, temperature=1.0).ids)
    assert not torch.equal(first.codes["image"][0][0], first.codes["image"][1][0])
    with pytest.raises(InputError, match="has 16 codes: max_new_tokens 5 is too small"):
        model.generate(prompt(model), max_new_tokens=5)
    with pytest.raises(InputError, match="max_new_tokens must be positive"):
        model.generate(prompt(model), max_new_tokens=0)


def gathered(rank: int, world: int) -> dict[str, Tensor]:
    model = tiny("janus_tiny")
    plan = make_plan(("text", "vision", "output_image"), Mesh(dp_shard=2))
    module = omnicompile.parallelize(model, plan, "cpu", example_batch=batch(model, 0))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    module(**batch(model, rank)).loss.backward()
    optimizer.step()
    plain = omni.gather_into(tiny("janus_tiny"), module).eval()
    got = plain.generate(prompt(plain), max_new_tokens=18)
    return {
        "ids": got.ids,
        "codes": got.codes["image"][0][0],
        "head": plain.state_dict()["decoder_image.head.0.weight"],
    }


@pytest.mark.slow
def test_a_sharded_model_generates_after_its_weights_are_gathered() -> None:
    results = run_ranks(gathered, 2)
    before = tiny("janus_tiny").state_dict()["decoder_image.head.0.weight"]
    assert not torch.equal(results[0]["head"], before)
    for name in ("ids", "codes", "head"):
        assert torch.equal(results[0][name], results[1][name])
