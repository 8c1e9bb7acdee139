"""What a user sees of a wrong declaration on the command line: one line, and exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from omni_models import EXAMPLES, WORDS

from omnicompile.cli.main import main
from omnicompile.cluster import Cluster
from omnicompile.plan import BlockPlan, Mesh, Plan
from omnicompile.workload import Workload

MODEL = """\
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from omnicompile import omni

FILE = Path(__file__).parent / "model.yaml"
WORDS = {words!r}


def tokenizer():
    numbers = {{word: number for number, word in enumerate(WORDS)}} | omni.read_config(FILE).special_tokens
    inner = Tokenizer(models.WordLevel({{w: n for w, n in numbers.items() if w != {lacks!r}}}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>")


def build():
    return omni.build(FILE{given})


def processor():
    process = omni.OmniProcessor(omni.build(FILE), tokenizer())

    def encode(sample):
        item = omni.Item({name!r}, torch.zeros(3, 8, 8), produced=True)
        return process([[omni.Text(sample.text), item]])

    return encode
"""


def written(folder: Path, own: dict[str, object], given: str = "", lacks: str = "", name: str = "image") -> str:
    """A model's file beside its declaration. given: further arguments of `omni.build`. lacks: a token that the
    tokenizer has not. name: of the decoder that the data has something for."""
    (folder / "model.yaml").write_text(yaml.safe_dump({"extends": str(EXAMPLES / "janus_tiny.yaml"), **own}))
    file = folder / "model.py"
    file.write_text(MODEL.format(words=WORDS, lacks=lacks, given=given, name=name))
    return str(file)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    code = main(list(arguments))
    said = capsys.readouterr()
    assert (code, said.out) == (2, "")
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    return said.err


WRONG: list[tuple[dict[str, object], str]] = [
    ({"encoders": {"image": {"class": "SiglipVisonModel"}}}, "encoder image: there is no class SiglipVisonModel"),
    ({"encoders": {"image": {"class": "torch.nn.Linear"}}}, "torch.nn.Linear is not a PreTrainedModel class"),
    ({"encoders": {"image": {"width": 40}}}, "its features are 32 wide, the projector takes 40: set width"),
    ({"encoders": {"image": {"projector": "none", "width": 64}}}, "width 64 do not match the language model's 32"),
    ({"encoders": {"image": {"token": "<img>"}}}, "special_tokens gives no id for <img>"),
    ({"special_tokens": {"<image>": 4000}}, "token_id is 4000, but the language model has 128 tokens"),
]


@pytest.mark.parametrize(("own", "message"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_plan_refuses_it_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], own: dict[str, object], message: str
) -> None:
    assert message in refused(capsys, "plan", written(tmp_path, own), "--gpus", "2", "--no-cache")


def test_a_special_token_that_the_tokenizer_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, {}, given=", tokenizer()", lacks="<output_image>")
    said = refused(capsys, "plan", file, "--gpus", "2", "--no-cache")
    assert "the tokenizer has no token <output_image>: add it with tokenizer.add_special_tokens" in said


def recipe(folder: Path, model: str, frozen: bool = False) -> str:
    blocks = {name: BlockPlan() for name in ("vision", "output_image", "text")}
    blocks["vision"] = BlockPlan(frozen=frozen)
    Plan(model, Cluster(1), Workload(64), Mesh(), blocks, param_dtype="float32").save(folder / "recipe.yaml")
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": "draw a red"}) + "\n" for _ in range(4)))
    return str(folder / "recipe.yaml")


@pytest.mark.parametrize(
    ("own", "options", "message"),
    [
        ({}, {"name": "sound"}, "no decoder for 'sound', only for image: add it to the decoders of its configuration"),
        ({"decoders": {"image": None}}, {}, "no decoder for 'image', only for nothing"),
        ({}, {"lacks": "<image>"}, "the model's id of <image> is 120, and the tokenizer has no such token"),
        (WRONG[0][0], {}, WRONG[0][1]),
        (WRONG[3][0], {}, WRONG[3][1]),
    ],
)
def test_train_refuses_it_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], own: dict[str, object], options: dict[str, str], message: str
) -> None:
    file = recipe(tmp_path, written(tmp_path, own, **options))
    arguments = ("--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "run"), "--device", "cpu")
    assert message in refused(capsys, "train", file, *arguments)


def test_train_refuses_a_recipe_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = recipe(tmp_path, written(tmp_path, {"encoders": {"image": None}}), frozen=True)
    arguments = ("--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "run"), "--device", "cpu")
    said = refused(capsys, "train", file, *arguments)
    assert "freezes the block vision, and the model has output_image, text: plan it again" in said
