"""Accelerators as data: `load_hardware("h100")` reads `hardware/h100.yaml`, or the file one gives.

Every constant of the cost model that depends on the machine stands in such a file, with a comment on its source.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from omnicompile.errors import InputError

_DIRECTORY = Path(__file__).parent / "hardware"
_DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
_T = TypeVar("_T")


@dataclass(frozen=True)
class Link:
    """bytes_per_second: of one GPU in one direction. latency_seconds: of one hop."""

    bytes_per_second: float
    latency_seconds: float


@dataclass(frozen=True)
class GemmEfficiency:
    """Constants of `kernels.gemm_seconds`; see docs/cost_model.md.

    max_fraction: of peak that a large GEMM sustains, by dtype.
    small_tile_fraction: speed of a 128x128 tile relative to a 256x128 one; each further halving costs it again.
    store_fraction: of the time of writing the result that is not hidden behind the products.
    grouped_tokens: a grouped GEMM with M tokens per expert runs at M / (M + grouped_tokens) of a batched one.
    tiles: (rows, columns) of the result that one multiprocessor (on a CPU: one rank's cores) works on at a time.
    load_fraction: of the time of reading the operands that comes on top (a CPU's kernels pack them first).
    """

    max_fraction: Mapping[str, float] = field(hash=False)
    small_tile_fraction: float
    store_fraction: float
    grouped_tokens: float
    tiles: tuple[tuple[int, int], ...] = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))
    load_fraction: float = 0.0


@dataclass(frozen=True)
class AttentionEfficiency:
    """Constants of `kernels.attention_seconds` for one implementation (FlashAttention-2, -3, ...).

    forward_fraction, backward_fraction: of peak for long sequences, by head dim (interpolated).
    forward_length, backward_length: segment length (tokens) at which non-causal attention runs at half of that.
    ramp_power: how steeply it gets there.
    causal_length: under a causal mask, the length at which masked parts of diagonal blocks take as long as the rest.
    wave_overhead: waves of thread blocks lost in filling and draining the GPU.
    measured_elements: q_tokens * heads * head_dim of the largest kernels behind these constants; larger ones are not
    taken to fill the GPU any better.
    causal_block: tokens of the blocks of keys that a causal mask skips as a whole: segments no longer than that take as
    long as without a mask. 0 where causal_length says it.
    """

    forward_fraction: Mapping[int, float] = field(hash=False)
    backward_fraction: Mapping[int, float] = field(hash=False)
    forward_length: float
    backward_length: float
    ramp_power: float
    causal_length: float
    wave_overhead: float
    measured_elements: float
    causal_block: float = 0.0


@dataclass(frozen=True)
class CollectiveEfficiency:
    """Constants of `collectives.collective_seconds`. Fractions are of the link's nominal rate.

    ring: rings inside a node; nvls: all-reduce in the switch, its bytes over its time
    (0: the switch cannot).
    inter: rings across nodes; all_to_all_intra, all_to_all_inter: all-to-all.
    base_seconds: launch and synchronization of any collective.
    ramp_bytes, ramp_power: message-size ramp, rate = full rate / (1 + (ramp_bytes / bytes) ** ramp_power).
    inter_ramp_bytes: the same across nodes.
    kind_factor: seconds of a kind of collective ("reduce_scatter", ...) relative to the formula; 1 where not listed.
    reduce_copies: bytes that a reduce-scatter holds besides what it reads and gives, relative to what it reads. One
    that works on a copy (gloo) does not need what it was given.
    gather_copies: bytes that an all-gather of several tensors holds besides what it reads and gives, relative to what
    it gives.
    tensor_seconds: by kind, of each tensor but the first of those that one call gathers or reduces; 0 where not listed.
    """

    ring: float
    nvls: float
    inter: float
    all_to_all_intra: float
    all_to_all_inter: float
    base_seconds: float
    ramp_bytes: float
    inter_ramp_bytes: float
    ramp_power: float
    kind_factor: Mapping[str, float] = field(default_factory=dict, hash=False)
    tensor_seconds: Mapping[str, float] = field(default_factory=dict, hash=False)
    reduce_copies: float = 0.0
    gather_copies: float = 0.0


@dataclass(frozen=True)
class Hardware:
    """One accelerator in its node and network.

    memory_bytes: what the driver reports as total. context_bytes: CUDA context and NCCL buffers.
    memory_reserve_fraction: of memory_bytes, kept free for the allocator's fragmentation.
    peak_flops: dense FLOP/s by dtype name ("float32" is without TF32, as PyTorch's default; "tfloat32" with).
    memory_bandwidth: bytes/s; memory_fraction of it is reached by streaming kernels.
    kernel_launch_seconds: floor of every kernel. kernel_overhead_seconds: added to every kernel, where none is queued
    while another runs (a CPU).
    sustained_fraction: of the rates of short kernel benchmarks that GEMM and attention keep up through a training step.
    attention: constants by implementation ("fa2", "fa3", ...), of one dtype as "fa2.float32".
    attention_kernel: the implementation assumed.
    contention_factor: relative slowdown of compute while a collective runs beside it (SMs and memory bandwidth shared).
    float8_gain: rate of linear layers in fp8 with one scale per tensor, relative to the products with a scale per block
    that gemm.max_fraction was fitted on.
    eager_traffic: bytes moved by element-wise work that is not compiled, relative to the fused kernels of Inductor.
    host_seconds: of the host to launch one operator from Python (a fused chain of element-wise ones counts as one).
    eager_seconds: floor of what Inductor fuses into one kernel and an uncompiled program launches as several.
    """

    name: str
    description: str
    aliases: tuple[str, ...]
    memory_bytes: float
    context_bytes: float
    memory_reserve_fraction: float
    peak_flops: Mapping[str, float] = field(hash=False)
    memory_bandwidth: float
    memory_fraction: float
    sm_count: int
    kernel_launch_seconds: float
    sustained_fraction: float
    intra_link: Link
    inter_link: Link
    host_link: Link
    gemm: GemmEfficiency
    attention: Mapping[str, AttentionEfficiency] = field(hash=False)
    attention_kernel: str
    collective: CollectiveEfficiency
    contention_factor: float
    float8_gain: float = 1.0
    eager_traffic: float = 1.0
    eager_seconds: float = 0.0
    host_seconds: float = 0.0
    kernel_overhead_seconds: float = 0.0

    def peak(self, dtype: str) -> float:
        """FLOP/s at `dtype` ("bfloat16", "torch.bfloat16", "bf16", "float8_e4m3fn", ...)."""
        return self.peak_flops[self.dtype_key(dtype)]

    def dtype_key(self, dtype: str) -> str:
        """The key of `peak_flops` for a dtype; InputError where this GPU has no such rate."""
        if dtype in self.peak_flops:
            return dtype
        name = dtype.removeprefix("torch.").lower()
        name = "float8" if name.startswith(("float8", "fp8")) else _DTYPE_NAMES.get(name, name)
        if name not in self.peak_flops:
            raise InputError(f"{self.name} has no rate for {dtype}: its file lists {', '.join(self.peak_flops)}")
        return name

    @property
    def flash(self) -> AttentionEfficiency:
        """Constants of the attention implementation assumed."""
        return self.attention[self.attention_kernel]

    def attention_at(self, dtype: str) -> AttentionEfficiency:
        """The same, or those that the file has for this dtype, as "KERNEL.DTYPE"."""
        return self.attention.get(f"{self.attention_kernel}.{self.dtype_key(dtype)}", self.flash)

    def with_attention_kernel(self, kernel: str) -> Hardware:
        """The same machine running another attention implementation; InputError if the file has none of that name."""
        if kernel not in self.attention:
            known = ", ".join(self.attention)
            raise InputError(f"{self.name} has no attention kernel {kernel!r}: its file lists {known}")
        return replace(self, attention_kernel=kernel)

    @property
    def usable_bytes(self) -> float:
        """Memory left for tensors: total less context and allocator reserve."""
        return self.memory_bytes * (1.0 - self.memory_reserve_fraction) - self.context_bytes


def known_hardware() -> list[str]:
    """Names that `load_hardware` knows."""
    return sorted(path.stem for path in _DIRECTORY.glob("*.yaml"))


def load_hardware(name_or_path: str) -> Hardware:
    """The hardware of that name or alias ("h100", "H100-80GB", "h100 sxm"), or of one's own YAML file.

    Raises InputError for an unknown name, an unreadable file, or unknown, missing or mistyped keys.
    """
    if name_or_path.endswith((".yaml", ".yml")):
        return _read(Path(name_or_path))
    names = _aliases()
    wanted = _normal(name_or_path)
    if wanted not in names:
        raise InputError(
            f"unknown GPU {name_or_path!r}: known are {', '.join(known_hardware())}; or give the path of a YAML file"
        )
    return _known(names[wanted])


def _normal(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower()).removeprefix("nvidia")


@cache
def _known(stem: str) -> Hardware:
    return _read(_DIRECTORY / f"{stem}.yaml")


@cache
def _aliases() -> dict[str, str]:
    return {_normal(alias): stem for stem in known_hardware() for alias in (stem, *_known(stem).aliases)}


def _read(path: Path) -> Hardware:
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the hardware file {path}: {error}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    hardware = _build(Hardware, data, str(path), "")
    absent = [dtype for dtype in hardware.peak_flops if dtype not in hardware.gemm.max_fraction]
    if absent:
        raise InputError(f"{path}: gemm.max_fraction lacks {', '.join(absent)}, which peak_flops lists")
    return hardware.with_attention_kernel(hardware.attention_kernel)


def _build(kind: type[_T], data: object, path: str, prefix: str) -> _T:
    """An instance of the dataclass `kind` from a YAML mapping, every key accounted for."""
    if not isinstance(data, dict):
        raise InputError(f"{path}: {prefix.rstrip('.') or 'the file'} must be a mapping")
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    unknown = [str(key) for key in data if key not in known]
    if unknown:
        raise InputError(f"{path}: unknown key {prefix}{unknown[0]}; known are {', '.join(known)}")
    missing = [key for key, f in known.items() if key not in data and f.default is f.default_factory is MISSING]
    if missing:
        raise InputError(f"{path}: missing key {prefix}{missing[0]}")
    hints = get_type_hints(kind)
    return kind(**{key: _value(hints[key], value, path, prefix + key) for key, value in data.items()})


def _value(hint: Any, value: object, path: str, key: str) -> Any:
    if hint in (Link, GemmEfficiency, CollectiveEfficiency):
        return _build(hint, value, path, key + ".")
    if hint == Mapping[str, AttentionEfficiency] and isinstance(value, dict):
        return {name: _build(AttentionEfficiency, item, path, f"{key}.{name}.") for name, item in value.items()}
    if hint is str and isinstance(value, str):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if hint is float:
        return _number(value, path, key)
    if hint == tuple[str, ...] and isinstance(value, list):
        return tuple(str(item) for item in value)
    if hint == tuple[tuple[int, int], ...] and isinstance(value, list) and value:
        return tuple(_tile(item, path, key) for item in value)
    if hint in (Mapping[str, float], Mapping[int, float]) and isinstance(value, dict) and value:
        wanted = str if hint == Mapping[str, float] else int
        if all(isinstance(name, wanted) for name in value):
            return {name: _number(item, path, f"{key}.{name}") for name, item in sorted(value.items())}
    raise InputError(f"{path}: {key} cannot be {value!r}")


def _tile(value: object, path: str, key: str) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or any(type(size) is not int or size < 1 for size in value):
        raise InputError(f"{path}: {key} must be pairs of whole numbers such as [128, 64], got {value!r}")
    return value[0], value[1]


def _number(value: object, path: str, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise InputError(f"{path}: {key} must be a number of at least 0 (write 1.0e+9, not 1e9), got {value!r}")
    return float(value)
