"""What may be named as a model, and what is said of what may not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from omnicompile.capture.source import ModelSource, load_model_source, source_of
from omnicompile.errors import InputError, OmniCompileError
from omnicompile.workload import Workload

FILE = """
import torch
from omnicompile import Workload

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

def build():
    return Net()

def small():
    return torch.nn.Linear(2, 2)

def workload():
    return {"seq_len": 128, "image_size": [32, 64], "freeze": ["vision"]}

def inputs(workload):
    return {"x": torch.ones(workload.seq_len, 4)}
"""
TEXT_CONFIG = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **TEXT_CONFIG}


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def write_config(path: Path, config: dict[str, Any]) -> str:
    return write(path, json.dumps(config))


def test_a_file_with_build_workload_and_inputs(tmp_path: Path) -> None:
    source = load_model_source(write(tmp_path / "net.py", FILE))
    module = source.build_meta()
    assert type(module).__name__ == "Net"
    assert all(p.is_meta for p in module.parameters())
    assert source.name == "net"
    assert source.workload == Workload(seq_len=128, image_size=(32, 64), freeze=("vision",))
    assert source.inputs is not None and source.inputs_vary
    assert source.inputs(Workload(seq_len=7))["x"].shape == (7, 4)


def test_a_named_function(tmp_path: Path) -> None:
    source = load_model_source(write(tmp_path / "net.py", FILE) + ":small")
    assert isinstance(source.build_meta(), torch.nn.Linear)
    assert source.name == "net:small"


def test_inputs_without_a_parameter(tmp_path: Path) -> None:
    text = FILE.replace("inputs(workload)", "inputs()").replace("workload.seq_len", "3")
    source = load_model_source(write(tmp_path / "net.py", text))
    assert source.inputs is not None and not source.inputs_vary
    assert source.inputs(Workload())["x"].shape == (3, 4)


def test_the_digest_follows_every_local_file(tmp_path: Path) -> None:
    helper = tmp_path / "omni_helper_a.py"
    helper.write_text("WIDTH = 4\n")
    path = write(tmp_path / "net.py", "def build():\n    import omni_helper_a\n")
    first = load_model_source(path).source_digest
    assert first == load_model_source(path).source_digest
    helper.write_text("WIDTH = 5\n")
    second = load_model_source(path).source_digest
    assert len({first, second, load_model_source(path + ":build").source_digest}) == 2


def test_the_digest_follows_the_data_files_that_the_source_names(tmp_path: Path) -> None:
    """Those beside them too: a declaration may extend another."""
    (tmp_path / "omni").mkdir()
    (tmp_path / "omni" / "model.yaml").write_text("extends: base.yaml\n")
    (tmp_path / "omni" / "base.yaml").write_text("width: 4\n")
    text = 'from pathlib import Path\n\nHERE = Path(__file__).parent / "omni"\n\n\ndef build():\n'
    path = write(tmp_path / "net.py", text + '    return (HERE / "model.yaml").read_text()\n')
    first = load_model_source(path).source_digest
    assert first == load_model_source(path).source_digest
    (tmp_path / "other.yaml").write_text("of another model\n")
    (tmp_path / "omni" / "notes.txt").write_text("no data\n")
    assert load_model_source(path).source_digest == first
    (tmp_path / "omni" / "base.yaml").write_text("width: 5\n")
    assert load_model_source(path).source_digest != first


@pytest.mark.parametrize("named", ["config.json", "."])
def test_a_config_file_or_its_directory(tmp_path: Path, named: str) -> None:
    write_config(tmp_path / "config.json", LLAMA)
    source = load_model_source(str(tmp_path / named))
    module = source.build_meta()
    assert type(module).__name__ == source.name == "LlamaForCausalLM"
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert all(p.is_meta for p in module.parameters())


def test_without_architectures_the_class_has_a_language_modelling_loss(tmp_path: Path) -> None:
    config = {key: value for key, value in LLAMA.items() if key != "architectures"}
    module = load_model_source(write_config(tmp_path / "config.json", config)).build_meta()
    assert type(module).__name__ == "LlamaForCausalLM"


def test_a_class_that_only_coordinates_gives_way_to_its_part(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    audio = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "output_dim": 16}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 16}
    text = {**TEXT_CONFIG, "rope_parameters": rope}
    parts = {"text_config": text, "audio_config": audio, "vision_config": vision}
    thinker = {"model_type": "qwen2_5_omni_thinker", **parts}
    config = {"model_type": "qwen2_5_omni", "architectures": ["Qwen2_5OmniModel"], "thinker_config": thinker}
    with pytest.raises(InputError, match="unknown class 'Qwen2_5OmniModel'"):
        load_model_source(write_config(tmp_path / "config.json", config)).build_meta()
    config["architectures"] = ["Qwen2_5OmniForConditionalGeneration"]
    module = load_model_source(write_config(tmp_path / "config.json", config)).build_meta()
    assert type(module).__name__ == "Qwen2_5OmniThinkerForConditionalGeneration"
    spec = "transformers:Qwen2_5OmniThinkerForConditionalGeneration"
    module = load_model_source(spec, str(tmp_path / "config.json")).build_meta()
    assert module.config.text_config.hidden_size == 16


def test_a_class_with_a_config(tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.json", LLAMA)
    source = load_model_source("transformers:LlamaForCausalLM", config)
    assert sum(p.numel() for p in source.build_meta().parameters()) == sum(
        p.numel() for p in load_model_source(config).build_meta().parameters()
    )
    config = write_config(tmp_path / "l.json", {"in_features": 3, "out_features": 5})
    linear = load_model_source(
        "torch.nn:Linear", write_config(tmp_path / "l.json", {"in_features": 3, "out_features": 5})
    )
    assert linear.build_meta().weight.shape == (5, 3)


def test_modules_and_functions_in_code_are_not_cached() -> None:
    module = torch.nn.Linear(3, 3)
    source = source_of(module)
    assert source.build_meta().weight.is_meta
    assert not module.weight.is_meta
    built = source_of(lambda: torch.nn.Linear(2, 2))
    assert built.build_meta().weight.is_meta
    assert not source.cacheable and not built.cacheable


def test_shared_parameters_stay_shared_in_the_meta_copy() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    module[1].weight = module[0].weight
    copy = source_of(module).build_meta()
    assert len(list(copy.parameters())) == 3


RAISES = "def helper():\n    raise ValueError('no weights\\nmore')\n\ndef build():\n    return helper()\n"
WRONG_FILES = [
    ("", r"net\.py has no build\(\) and no other function: add def build\(\)"),
    (
        "def make(): ...\ndef other(): ...\n",
        r"has no build\(\); it defines make, other: name one.*net\.py:other",
    ),
    (RAISES, r"net\.py: build\(\) raised ValueError: no weights \(.*net\.py:2\)$"),
    ("def build():\n    return 3\n", r"must return a torch\.nn\.Module, and returned a int"),
    (
        "import no_such_module_at_all\n",
        r"importing it raised ModuleNotFoundError: .*net\.py:1\)",
    ),
    ("def build(:\n", r"importing it raised SyntaxError: .*net\.py:1"),
    ("import sys\nsys.exit(3)\n", r"importing it raised SystemExit: 3 \(.*net\.py:2\)"),
    (
        "def build(): ...\ndef workload():\n    return {'seqlen': 3}\n",
        r"unknown key 'seqlen' \(did you mean seq_len\?\)",
    ),
    ("def build(): ...\ndef workload():\n    return {'seq_len': 0}\n", r"--seq-len must be at least 1"),
    ("def build(): ...\ndef workload():\n    return 3\n", r"workload\(\) must return a Workload or a dict"),
    ("def build(): ...\ndef workload():\n    return 1 / 0\n", r"workload\(\) raised ZeroDivisionError.*net\.py:3"),
]


@pytest.mark.parametrize(("text", "message"), WRONG_FILES)
def test_files_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(OmniCompileError, match=message) as raised:
        load_model_source(write(tmp_path / "net.py", text)).build_meta()
    assert "\n" not in str(raised.value)


def test_inputs_that_cannot_be_used(tmp_path: Path) -> None:
    source = load_model_source(write(tmp_path / "net.py", "def build(): ...\ndef inputs():\n    return 3\n"))
    assert source.inputs is not None
    with pytest.raises(InputError, match=r"inputs\(\) must return a dict of the forward's arguments"):
        source.inputs(None)


WRONG_CONFIGS = [
    ("{", r"config\.json:1: malformed JSON"),
    ("[]", r"must be a JSON object, and is a list"),
    ("{}", r"has neither model_type nor architectures"),
    ('{"model_type": "lama"}', r"unknown model_type 'lama' \(did you mean llama\?\)"),
    ('{"model_type": "zzz", "auto_map": {}}', r"unknown model_type 'zzz'; the model brings its own code \(auto_map\)"),
    ('{"model_type": "llama", "architectures": ["LlamaForCausalLN"]}', r"did you mean LlamaForCausalLM\?"),
    (
        '{"architectures": ["NoSuchClassXyzzy"]}',
        r"unknown class 'NoSuchClassXyzzy'.*transformers does not have",
    ),
    ('{"model_type": "llama", "num_attention_heads": "x"}', r"building the model raised \w+: "),
]


@pytest.mark.parametrize(("text", "message"), WRONG_CONFIGS)
def test_configs_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        load_model_source(write(tmp_path / "config.json", text)).build_meta()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("spec", "config", "message"),
    [
        ("missing.py", None, r"missing\.py does not exist: give a python file"),
        ("missing.py:build", None, r"missing\.py does not exist"),
        ("missing/config.json", None, r"config\.json does not exist"),
        ("someone/some-model", None, r"does not exist; names on a hub are not downloaded"),
        ("no_such_package_x:Class", None, r"there is no module 'no_such_package_x'"),
        ("torch.nn:Linaer", None, r"torch\.nn has no Linaer \(did you mean Linear\?\)"),
        ("torch:__version__", None, r"not a class or a function"),
        ("transformers:LlamaForCausalLM", None, r"needs its configuration: add --config config\.json"),
        ("transformers:LlamaForCausalLM", "missing.json", r"missing\.json does not exist"),
    ],
)
def test_names_that_mean_nothing(spec: str, config: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_model_source(spec, config)


def test_a_class_with_the_config_of_another(tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.json", {"model_type": "bert"})
    with pytest.raises(InputError, match="configuration of model type 'bert', and LlamaForCausalLM takes 'llama'"):
        load_model_source("transformers:LlamaForCausalLM", config)


def test_a_directory_and_a_file_of_other_kinds(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no config\.json"):
        load_model_source(str(tmp_path))
    with pytest.raises(InputError, match="is not a model: give"):
        load_model_source(write(tmp_path / "weights.bin", ""))
    with pytest.raises(InputError, match="--config goes with package"):
        load_model_source(write(tmp_path / "net.py", FILE), "config.json")


def test_loading_a_source_does_not_import_torch(tmp_path: Path) -> None:
    write_config(tmp_path / "config.json", LLAMA)
    write(tmp_path / "net.py", "def build():\n    import torch\n    return torch.nn.Linear(2, 2)\n")
    code = (
        "import sys, omnicompile; from omnicompile.capture.source import load_model_source as load\n"
        f"load({str(tmp_path)!r}); load({str(tmp_path / 'net.py')!r})\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sources_are_values() -> None:
    assert isinstance(load_model_source("torch.nn:Identity"), ModelSource)
