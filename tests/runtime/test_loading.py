"""Ranks take their parts of a Hugging Face checkpoint and of a model's own initialization; no process needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes.models import stacked_mixture_vl_model
from rank_stores import EVERYONE, specs_of, store_of
from safetensors.torch import load_file, save_file
from tiny_models import dense_model, mixture_model, vision_language_model
from torch import Tensor, nn

from omnicompile.errors import InputError
from omnicompile.passes.rank_program import ParamSpec, ShardSpec
from omnicompile.plan import Mesh
from omnicompile.runtime.conversion import PIECE_BYTES, Converted, Source
from omnicompile.runtime.loading import Pretrained
from omnicompile.runtime.parallelize import parallelize
from omnicompile.runtime.parameters import bit_sum
from omnicompile.runtime.safetensors_folder import SafetensorsFolder
from omnicompile.runtime.weights import Initialized, InitialValues, materialized

MESHES = [Mesh(dp_shard=4), Mesh(dp_replicate=3), Mesh(dp_shard=2, sp=2, ep=2), Mesh(dp_shard=4, ep=4)]
MODELS = {"images": vision_language_model, "experts": mixture_model, "square experts": stacked_mixture_vl_model}


def tied_model() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=127, hidden_size=32, intermediate_size=65, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=6, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).float().train()


def on_meta(model: Any) -> Any:
    with torch.device("meta"):
        return type(model)(model.config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[nn.Module, Path]]:
    """By name: the model, and its checkpoint in several files."""
    root, found = tmp_path_factory.mktemp("pretrained"), {}
    for name, make in (MODELS | {"tied": tied_model}).items():
        found[name] = make(), root / name
        found[name][0].save_pretrained(root / name, max_shard_size="40KB")
    return found


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", [*MODELS, "tied"])
def test_every_rank_reads_its_part_and_no_more(
    folders: dict[str, tuple[nn.Module, Path]], name: str, mesh: Mesh
) -> None:
    model, folder = folders[name]
    meta = on_meta(model)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    specs = specs_of(model, mesh)
    for rank in range(mesh.world):
        store = store_of(mesh, rank, specs)
        values = Pretrained.of(meta, folder, 0)
        store.fill(values)
        assert list(store.local) == list(specs)
        for key, value in model.named_parameters():
            assert torch.equal(store.local[key], specs[key].local_of(value.detach(), mesh, rank)), key
        parts = [torch.empty(spec.shape, device="meta")[store.part_of(key)] for key, spec in specs.items()]
        assert values.folder.read_bytes == sum(part.numel() * 4 for part in parts)


def test_the_experts_of_the_checkpoint_lie_apart(folders: dict[str, tuple[nn.Module, Path]]) -> None:
    """What the test above converts: the model has them in one tensor."""
    model, folder = folders["experts"]
    keys = SafetensorsFolder(folder).names()
    assert "model.layers.0.mlp.experts.3.gate_proj.weight" in keys
    assert "model.layers.0.mlp.experts.gate_up_proj" in dict(model.named_parameters())


def test_a_single_process_gets_the_whole_model(folders: dict[str, tuple[nn.Module, Path]]) -> None:
    for model, folder in folders.values():
        module = parallelize(on_meta(model), None, "cpu", weights=folder)
        state = module.state_dict()
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        buffers = dict(module.plain_model.named_buffers())
        assert buffers and all(torch.equal(buffers[key], value) for key, value in model.named_buffers())


def changed(folder: Path, target: Path, change: Any) -> Path:
    """A copy of a checkpoint in one file, its tensors changed."""
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    change(tensors)
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def dropped(key: str) -> Any:
    return lambda tensors: tensors.pop(key)


def added(key: str) -> Any:
    return lambda tensors: tensors.update({key: torch.ones(2)})


def resized(key: str) -> Any:
    return lambda tensors: tensors.update({key: tensors[key][:-1].clone()})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("images", dropped("lm_head.weight"), "it has no lm_head.weight"),
        ("images", added("model.layers.9.mlp.up_proj.weight"), "unexpected model.layers.9.mlp.up_proj.weight"),
        ("images", resized("lm_head.weight"), r"lm_head.weight of shape \[127, 32\], the model \[128, 32\]"),
        ("experts", dropped("model.layers.1.mlp.experts.2.up_proj.weight"), "experts.gate_up_proj cannot be made of"),
        ("experts", dropped("model.layers.0.mlp.gate.weight"), "it has no model.layers.0.mlp.gate.weight"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    folders: dict[str, tuple[nn.Module, Path]], tmp_path: Path, name: str, change: Any, message: str
) -> None:
    model, folder = folders[name]
    with pytest.raises(InputError, match=message):
        Pretrained.of(on_meta(model), changed(folder, tmp_path / "changed", change), 0)


def test_experts_that_an_old_checkpoint_has_transposed(
    folders: dict[str, tuple[nn.Module, Path]], tmp_path: Path
) -> None:
    """transformers transposes where the shape does not fit: a part of the shape must not decide that."""
    model, folder = folders["square experts"]
    key = "model.language_model.layers.0.mlp.experts.down_proj"

    def transpose(tensors: dict[str, Tensor]) -> None:
        tensors[key] = tensors[key].transpose(1, 2).contiguous()

    old = changed(folder, tmp_path / "old", transpose)
    specs = specs_of(model, MESHES[2])
    for rank in range(4):
        store, values = store_of(MESHES[2], rank, specs), Pretrained.of(on_meta(model), old, 0)
        values.fill(store, [key])
        assert torch.equal(store.local[key], specs[key].local_of(model.get_parameter(key).detach(), MESHES[2], rank))
        assert values.folder.read_bytes == store.local[key].numel() * 4


def test_what_transformers_ignores_is_ignored(folders: dict[str, tuple[nn.Module, Path]], tmp_path: Path) -> None:
    model, folder = folders["images"]
    values = Pretrained.of(on_meta(model), changed(folder, tmp_path / "old", added("model.rotary_emb.inv_freq")), 0)
    assert torch.equal(materialized(on_meta(model), values).state_dict()["lm_head.weight"], model.lm_head.weight)


def test_files_that_are_not_there_or_broken(folders: dict[str, tuple[nn.Module, Path]], tmp_path: Path) -> None:
    model, folder = folders["images"]
    with pytest.raises(InputError, match=r"has neither model\.safetensors nor"):
        Pretrained.of(on_meta(model), tmp_path, 0)
    copied = changed(folder, tmp_path / "copied", lambda tensors: None)
    content = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read"):
        Pretrained.of(on_meta(model), copied, 0)
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(InputError, match=r"names gone\.safetensors, which is not there"):
        Pretrained.of(on_meta(model), copied, 0)
    with pytest.raises(InputError, match="this one has its own"):
        parallelize(model, None, "cpu", weights=folder)


@pytest.mark.parametrize("make", [*MODELS.values(), tied_model, dense_model])
def test_initial_values_are_the_same_in_parts_and_look_like_the_models_own(make: Any) -> None:
    config = make().config
    torch.manual_seed(0)
    model, meta = type(make())(config), on_meta(make())
    alone = dict(materialized(meta, Initialized(meta, 3)).named_parameters())
    other = dict(materialized(meta, Initialized(meta, 4)).named_parameters())
    assert all(value.is_meta for value in meta.parameters())
    mesh = Mesh(dp_shard=2, sp=2)
    specs = specs_of(model, mesh)
    for rank in range(mesh.world):
        store = store_of(mesh, rank, specs)
        store.fill(Initialized(meta, 3))
        assert all(torch.equal(store.local[k], specs[k].local_of(v.detach(), mesh, rank)) for k, v in alone.items())
    for name, value in model.named_parameters():
        assert alone[name].std().item() == pytest.approx(value.std().item(), rel=0.3, abs=0.005), name
        assert value.std() < 1e-6 or not torch.equal(alone[name], other[name])
    values = [value.flatten()[:50] for value in alone.values() if value.std() > 0 and value.numel() >= 50]
    assert len({tuple(value.tolist()) for value in values}) == len(values)  # each has a seed of its own


class Halves(nn.Module):
    """Its initialization copies one parameter from another of a child."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.twin = nn.Parameter(torch.empty(8, 8))
        self.rest = nn.Linear(8, 3)
        self.register_buffer("scale", torch.ones(3))

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.twin.copy_(self.inner.weight * 2)
            self.scale.fill_(0.5)


def test_parameters_that_are_initialized_together_are_held_together() -> None:
    with torch.device("meta"):
        meta = Halves()
    units = [set(values) for values in InitialValues(meta, 0).units([*dict(meta.named_parameters()), "scale"])]
    assert {"inner.weight", "inner.bias", "twin", "scale"} in units
    assert {"rest.weight", "rest.bias"} in units
    made = materialized(meta, Initialized(meta, 0))
    assert torch.equal(made.twin, made.inner.weight * 2)  # type: ignore[operator]
    assert made.scale.tolist() == [0.5] * 3


class Unset(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3))


class HalfSet(Unset):
    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight[:2] = 0.0


def test_a_parameter_that_nobody_initializes_is_named() -> None:
    for kind, message in ((Unset, "no reset_parameters"), (HalfSet, "leaves 0.weight unset")):
        with torch.device("meta"):
            model = nn.Sequential(kind())
        with pytest.raises(InputError, match=rf"{message}|{kind.__name__}") as caught:
            materialized(model, Initialized(model, 0))
        assert "0.weight" in str(caught.value) and message in str(caught.value)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[str], Any, list[tuple[int, ...]], str]:
    """Kinds of conversions that transformers has: (patterns, converter, shapes of the sources, name of the result)."""
    from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter

    rows, columns, count = (draw(st.integers(1, 7)) for _ in range(3))
    kind = draw(st.sampled_from(["stack", "stack two", "join", "transpose", "stack and transpose"]))
    if kind == "join":
        converter = WeightConverter(["q", "k"], "qk", [Concatenate(dim=draw(st.integers(0, 0)))])
        return ["q", "k"], converter, [(rows, columns), (count, columns)], "qk"
    if kind == "transpose":
        return ["q"], WeightConverter("q", "t", [Transpose(0, 1)]), [(rows, columns)], "t"
    if kind == "stack two":
        converter = WeightConverter(["e.*.g", "e.*.u"], "e.gu", [MergeModulelist(dim=0), Concatenate(dim=1)])
        shapes = [(rows, columns)] * (2 * count)
        return ["e.*.g"] * count + ["e.*.u"] * count, converter, shapes, "e.gu"
    operations: list[Any] = [MergeModulelist(dim=0)]
    if kind == "stack and transpose":
        operations.append(Transpose(1, 2))
    return ["e.*.g"] * count, WeightConverter("e.*.g", "e.all", operations), [(rows, columns)] * count, "e.all"


def read(
    one: Converted, folder: SafetensorsFolder, name: str, part: tuple[slice, ...], limit: int = PIECE_BYTES
) -> Tensor:
    """The pieces of `part` put together, each element given exactly once."""
    made = torch.full([there.stop - there.start for there in part], float("nan"))
    for piece, value in one.read(folder, name, part, limit):
        within = tuple(slice(there.start - own.start, there.stop - own.start) for there, own in zip(piece, part))
        assert made[within].isnan().all()
        made[within] = value
    assert not made.isnan().any()
    return made


class Config:
    """Stands for a model where a conversion does not look at it."""

    config = None


@settings(max_examples=60, deadline=None)
@given(layouts(), st.sampled_from([4, 40, 1 << 20]), st.data())
def test_any_part_of_a_conversion_is_that_part_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, layout: tuple[list[str], Any, list[tuple[int, ...]], str],
    limit: int, data: Any,
) -> None:  # fmt: skip
    """limit: bytes of a piece."""
    patterns, converter, shapes, name = layout
    folder = tmp_path_factory.mktemp("layout")
    tensors = {f"{number}.{pattern}": torch.randn(shapes[number]) for number, pattern in enumerate(patterns)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    sources = [Source(key, pattern, tuple(value.shape)) for (key, value), pattern in zip(tensors.items(), patterns)]
    opened = SafetensorsFolder(folder)
    one = Converted(name, converter, sources, Config())
    shape = one.shape(opened, name)
    whole = read(one, opened, name, tuple(slice(0, size) for size in shape))
    assert whole.numel() == sum(value.numel() for value in tensors.values())
    assert sorted(whole.flatten().tolist()) == sorted(x for value in tensors.values() for x in value.flatten().tolist())
    part = []
    for size in shape:
        start = data.draw(st.integers(0, size - 1))
        part.append(slice(start, data.draw(st.integers(start + 1, size))))
    before = opened.read_bytes
    assert torch.equal(read(one, opened, name, tuple(part), limit), whole[tuple(part)])
    assert opened.read_bytes - before == whole[tuple(part)].numel() * 4  # and no other rows or columns were read


MEASURE = """
import ctypes, gc, sys, torch
sys.path[:0] = [{tests!r}]
from rank_stores import specs_of, store_of
from omnicompile.plan import Mesh
from omnicompile.runtime.loading import Pretrained
from transformers import AutoConfig, Qwen3MoeForCausalLM
def memory(kind):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(kind))
def prepared(folder):
    with torch.device("meta"):
        meta = Qwen3MoeForCausalLM(AutoConfig.from_pretrained(folder))
    mesh = Mesh(dp_shard=4, ep=2)
    return store_of(mesh, 1, specs_of(meta, mesh)), Pretrained.of(meta, folder, 0)
small, values = prepared({small!r})
small.fill(values)  # so that code is in memory
own, values = prepared({folder!r})
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = memory("VmRSS")
own.fill(values)
print(memory("VmHWM") - before, sum(parameter.numel() * 4 for parameter in own.local.values()))
"""


def _save(folder: Path, width: int, layers: int, file_size: str) -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=8 * width, hidden_size=width, intermediate_size=width, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, head_dim=width // 8, num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=4 * width, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(folder, max_shard_size=file_size)
    return model


@pytest.mark.slow
def test_loading_holds_no_more_than_one_file_and_the_own_part(tmp_path: Path) -> None:
    """Peak of the resident memory of a process, pages of mapped files included. A layer's experts are a sixth of the
    rank's part: converted in one go, they would be there twice more."""
    folder, small = tmp_path / "large", tmp_path / "small"
    _save(small, 64, 2, "200KB")
    whole = sum(p.numel() * 4 for p in _save(folder, 512, 3, "16MB").parameters())
    largest = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    code = MEASURE.format(tests=str(Path(__file__).parent.parent), folder=str(folder), small=str(small))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak, own = map(int, done.stdout.split()[-2:])
    mib = 2**20
    print(f"peak {peak / mib:.0f} MiB: own {own / mib:.0f}, file {largest / mib:.0f}, model {whole / mib:.0f}")
    assert own < peak < 1.05 * (own + largest) < whole / 2


def test_adapters_that_cannot_be_initialized_on_the_meta_device() -> None:
    import peft

    orthogonal = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="orthogonal")
    other = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    for config, message in ((orthogonal, "'orthogonal'"), (other, "works for LoRA only")):
        with torch.device("meta"):
            model = peft.get_peft_model(on_meta(dense_model()), config)
        with pytest.raises(InputError, match=message):
            materialized(model, Initialized(model, 0))


def test_adapters_get_the_initialization_of_peft() -> None:
    import peft

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"])
    model = peft.get_peft_model(on_meta(dense_model()), config)
    made = dict(materialized(model, Initialized(model, 0)).named_parameters())
    zero = [name for name, value in made.items() if not value.any()]
    assert zero == [n for n in made if ".lora_B." in n or ".lora_embedding_A." in n]
    bound = 1 / 32**0.5  # kaiming_uniform_ with a = sqrt(5), 32 inputs
    values = torch.cat([value.flatten() for name, value in made.items() if ".lora_A." in name])
    assert values.abs().max() <= bound and values.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    trained = [name for name, value in made.items() if value.requires_grad]
    assert trained == [name for name in made if "lora_" in name]


def test_the_bit_sums_of_parts_add_up_to_that_of_the_whole(folders: dict[str, tuple[nn.Module, Path]]) -> None:
    """By which frozen parameters are known again under another plan; padding must count for nothing."""
    mesh, (model, _) = Mesh(dp_shard=4), folders["tied"]
    for name, value in model.named_parameters():
        spec = ParamSpec(name, tuple(value.shape), shards=(ShardSpec(EVERYONE, 0),))
        parts = [bit_sum(spec.local_of(value.detach(), mesh, rank)) for rank in range(4)]
        assert sum(parts) == bit_sum(value)
        assert bit_sum(value) != bit_sum(value * 1.001)
