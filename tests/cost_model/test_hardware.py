"""Hardware files: all load, aliases resolve, and mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import omnicompile.cost_model.hardware as hardware_module
from omnicompile.cost_model.hardware import known_hardware, load_hardware
from omnicompile.cost_model.step_price import DTYPE_BYTES
from omnicompile.errors import InputError

FILES = Path(hardware_module.__file__).parent / "hardware"


def test_known_names_load() -> None:
    assert known_hardware() == ["a100", "b200", "h100", "h200", "h800"]
    for name in known_hardware():
        hw = load_hardware(name)
        assert hw.name == name
        assert 0.8 * hw.memory_bytes < hw.usable_bytes < hw.memory_bytes
        assert hash(hw) == hash(load_hardware(name.upper()))
        assert DTYPE_BYTES.keys() <= hw.peak_flops.keys()  # whatever a plan computes in


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("H100", "h100"),
        ("H100-80GB", "h100"),
        ("h100 sxm", "h100"),
        ("NVIDIA H100 80GB", "h100"),
        ("a100_80gb", "a100"),
        ("H200-141GB", "h200"),
        ("B200", "b200"),
    ],
)
def test_aliases(alias: str, name: str) -> None:
    assert load_hardware(alias).name == name


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(InputError, match=r"unknown GPU 'mi300'.*a100, b200, h100, h200, h800"):
        load_hardware("mi300")


def _write(tmp_path: Path, **changes: object) -> str:
    data = yaml.safe_load((FILES / "h100.yaml").read_text())
    for key, value in changes.items():
        if value is None:
            del data[key]
        else:
            data[key] = value
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


def test_own_file(tmp_path: Path) -> None:
    assert load_hardware(_write(tmp_path, name="own", sm_count=100)).sm_count == 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sm_count": None}, "missing key sm_count"),
        ({"sm_cuont": 3}, "unknown key sm_cuont"),
        ({"sm_count": "many"}, "sm_count cannot be 'many'"),
        ({"memory_bytes": "80GB"}, "memory_bytes must be a number"),
        ({"intra_link": {"bytes_per_second": 1.0}}, "missing key intra_link.latency_seconds"),
        ({"intra_link": 5}, "intra_link must be a mapping"),
        ({"peak_flops": {"float4": 1.0}}, "gemm.max_fraction lacks float4"),
        ({"attention_kernel": "fa9"}, "no attention kernel 'fa9'.*fa2, fa3"),
        ({"attention": {"fa3": {"wave_overhead": 1.0}}}, "missing key attention.fa3.forward_fraction"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_hardware(_write(tmp_path, **changes))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        load_hardware(str(tmp_path / "absent.yaml"))
    path = tmp_path / "bad.yaml"
    path.write_text("a: [")
    with pytest.raises(InputError, match="is not YAML"):
        load_hardware(str(path))
    path.write_text("- 1")
    with pytest.raises(InputError, match="must be a mapping"):
        load_hardware(str(path))


def test_dtypes() -> None:
    hw = load_hardware("h100")
    assert hw.peak("bf16") == hw.peak("torch.bfloat16") == hw.peak("bfloat16") == 989e12
    assert hw.peak("torch.float8_e4m3fn") == hw.peak("fp8") == 1979e12
    with pytest.raises(InputError, match="a100 has no rate for float8"):
        load_hardware("a100").peak("float8")
