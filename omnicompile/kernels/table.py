"""All implementations, in the order in which they are taken where nothing is forced or measured."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

import torch

from omnicompile.kernels.registry import CPU, INDUCTOR, Functions, Kernel, Key, Package, Problem

VARIANTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "attention": ("dense", "packed", "windowed"),
        "grouped_mm": ("rows",),
        "rms_norm": ("plain",),
        "swiglu": ("plain",),
        "rope": ("plain",),
        "cross_entropy": ("sum",),
        "linear_cross_entropy": ("sum",),
    }
)
OPERATORS = tuple(VARIANTS)
REWRITTEN = ("rms_norm", "swiglu", "rope", "cross_entropy", "linear_cross_entropy")

_GPUS = ("sm80", "sm90", "sm100", "sm110", "sm120")
_OLD_GPUS = ("sm50", "sm60", "sm70")
_ANY = (CPU, *_OLD_GPUS, *_GPUS)
_HALF = (torch.bfloat16, torch.float16)
_SINGLE = (*_HALF, torch.float32)
_EVERY_FACT = frozenset({"softcap", "sinks", "unequal_heads", "mixed_dtypes", "unaligned", "uneven_halves", "layout"})

_FLASH2 = Package("flash_attn.flash_attn_interface", "flash-attn", "2.7", "pip install flash-attn")
_FLASH3 = Package("flash_attn_interface", install="build hopper/ of github.com/Dao-AILab/flash-attention")
_FLASH4 = Package("flash_attn.cute.interface", "flash-attn-4", install="pip install flash-attn-4")
_LIGER = (Package("triton", "triton", "3.0", "pip install triton"),
          Package("liger_kernel", "liger-kernel", "0.8", "pip install liger-kernel"))  # fmt: skip


def _attention() -> list[Kernel]:
    every, here = VARIANTS["attention"], "omnicompile.kernels.attention"
    return [
        Kernel("attention", "torch_cpu", every, (CPU,), f"{here}.torch_cpu", about="torch's fused kernel, by segment"),
        Kernel(
            "attention", "torch_flash", every, _GPUS, f"{here}.torch_flash", (), _HALF, 256, 8,
            about="torch's own flash kernel",
        ),
        Kernel(
            "attention", "flash_attn2", every, _GPUS, f"{here}.flash2", (_FLASH2,), _HALF, 256, 8,
            frozenset({"softcap"}), about="the package flash-attn",
        ),
        Kernel(
            "attention", "flash_attn3", every, ("sm90",), f"{here}.flash3", (_FLASH3,), _HALF, 256, 8,
            about="flash_attn_interface, for Hopper",
        ),
        Kernel(
            "attention", "flash_attn4", every, ("sm90", "sm100", "sm110"), f"{here}.flash4", (_FLASH4,), _HALF, 128, 8,
            about="flash_attn.cute, for Hopper and Blackwell",
        ),
        Kernel(
            "attention", "torch_varlen", every, _GPUS, f"{here}.torch_varlen", (Package("torch.nn.attention.varlen"),),
            _HALF, 256, 8, about="torch.nn.attention.varlen",
        ),
        Kernel(
            "attention", "flex", every, _GPUS, f"{here}.flex",
            (Package("torch.nn.attention.flex_attention"),), _SINGLE, 256, 1, frozenset({"softcap"}),
            about="flex attention, compiled on GPUs; the backward runs its forward again", smallest_head=16,
        ),
        Kernel(
            "attention", "reference", every, _ANY, f"{here}.reference", can=_EVERY_FACT,
            about="plain operators, every score kept",
        ),
    ]  # fmt: skip


def _rewritten() -> list[Kernel]:
    found = []
    for operator in REWRITTEN:
        every = VARIANTS[operator]
        rotary = operator == "rope"
        fused = operator == "linear_cross_entropy"
        liger = f"omnicompile.kernels.liger_{'losses' if 'entropy' in operator else 'layers'}"
        found += [
            Kernel(
                operator, INDUCTOR, every, _ANY, can=_EVERY_FACT,
                about="the chunked loss head in plain operators" if fused else "left to the compiler",
            ),
            Kernel(
                operator, "liger", every, (CPU, *_OLD_GPUS[2:], *_GPUS), f"{liger}:{operator}", _LIGER, _SINGLE,
                256 if rotary else 0, 2, interpreted=True, about="Triton kernels of the package liger-kernel",
            ),
            Kernel(
                operator, "reference", every, _ANY, f"omnicompile.kernels.reference:{operator}", can=_EVERY_FACT,
                about="plain operators, forward and backward written out",
            ),
        ]  # fmt: skip
    return found


def _grouped() -> list[Kernel]:
    every = VARIANTS["grouped_mm"]
    return [
        Kernel(
            "grouped_mm", "torch", every, ("sm80", "sm90", "sm100", "sm110", "sm120"),
            "omnicompile.kernels.grouped:torch_grouped", (), (torch.bfloat16,), about="torch.nn.functional.grouped_mm",
        ),
        Kernel(
            "grouped_mm", "reference", every, _ANY, "omnicompile.kernels.grouped:reference", can=_EVERY_FACT,
            about="one product an expert; waits for the number of rows",
        ),
    ]  # fmt: skip


KERNELS: tuple[Kernel, ...] = (*_attention(), *_grouped(), *_rewritten())
REGISTRY: Mapping[Key, Kernel] = MappingProxyType({key: kernel for kernel in KERNELS for key in kernel.places()})


def kernels_of(operator: str) -> tuple[Kernel, ...]:
    return tuple(kernel for kernel in KERNELS if kernel.operator == operator)


def find_kernel(operator: str, name: str) -> Kernel:
    """Raises KeyError for a name that the operator has no implementation of."""
    found = {kernel.name: kernel for kernel in kernels_of(operator)}
    return found[name]


@cache
def functions_of(operator: str, name: str) -> Functions:
    return find_kernel(operator, name).functions()


def able_kernels(problem: Problem) -> list[Kernel]:
    """What computes this problem here, in order. There always is one: `reference`, the last."""
    places = ((problem.operator, problem.variant, one.name, problem.hardware) for one in kernels_of(problem.operator))
    return [REGISTRY[place] for place in places if place in REGISTRY and not REGISTRY[place].unable(problem)]


@cache
def default_kernel(problem: Problem) -> Kernel:
    """The first one that computes this problem here."""
    return able_kernels(problem)[0]
