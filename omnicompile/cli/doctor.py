"""`omnicompile doctor`: what this installation and machine can do, and what to install for the rest."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from omnicompile.cli.progress import color_wanted, emit

HELP = "print what this installation and machine can do, and what to install for the rest"
EXAMPLES = """\
examples:
  omnicompile doctor
  omnicompile doctor --json
  omnicompile doctor --kernels rms_norm=liger

The exit code is 0 when planning works here, 2 when it does not.
"""
PYTHON = ((3, 11), (3, 13))
RANGES = {"torch": ((2, 11), (2, 13)), "transformers": ((5, 20), (5, 99))}
REQUIRED = ("sympy", "networkx", "scipy", "numpy", "pyyaml", "rich", "safetensors")


@dataclass(frozen=True)
class Check:
    """One line of the report. needed: planning does not work without it. remedy: what to do where it is not ok."""

    area: str
    name: str
    ok: bool
    detail: str
    remedy: str = ""
    needed: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    parser.add_argument("--kernels", metavar="LIST", help="check a choice such as attention=flash_attn2,rms_norm=liger")


def run(args: argparse.Namespace) -> int:
    checks = all_checks(args.kernels)
    usable = all(check.ok for check in checks if check.needed)
    if args.json:
        emit(json.dumps({"usable": usable, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        emit(_text(checks, usable))
    return 0 if usable else 2


def all_checks(kernels: str | None = None) -> list[Check]:
    """kernels: a choice to check. Raises InputError for one that cannot be used here."""
    checks = [_python(), *map(_ranged, RANGES), *map(_package, REQUIRED), _machine()]
    if find_spec("torch") is None:
        return checks
    return [*checks, *_devices(), *_communication(), *_backends(), *_kernels(kernels)]


def _python() -> Check:
    here = sys.version_info[:2]
    wanted = f"{PYTHON[0][0]}.{PYTHON[0][1]} to {PYTHON[1][0]}.{PYTHON[1][1]}"
    ok = PYTHON[0] <= here <= PYTHON[1]
    return Check("plan", "python", ok, f"{here[0]}.{here[1]}", f"use Python {wanted}", needed=True)


def _ranged(name: str) -> Check:
    low, high = RANGES[name]
    wanted = f"{name} {low[0]}.{low[1]} to {high[0]}.{high[1]}"
    found = installed(name)
    if found is None:
        return Check("plan", name, False, "not installed", f"pip install {name} ({wanted})", needed=True)
    release = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    return Check("plan", name, low <= release <= high, found, f"install {wanted}", needed=True)


def _package(name: str) -> Check:
    found = installed(name)
    return Check("plan", name, found is not None, found or "not installed", f"pip install {name}", needed=True)


def _machine() -> Check:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0
    detail = f"{os.cpu_count()} cores, {memory:.0f} GiB memory (each process holds the whole weights at its start)"
    return Check("train", "host", True, detail)


def _devices() -> list[Check]:
    import torch

    if not torch.cuda.is_available():
        why = "this torch has no CUDA" if torch.version.cuda is None else "no usable GPU or driver"
        return [Check("train", "GPU", False, why, "planning needs none; training at speed needs one")]
    names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    first = names[0]
    detail = f"{len(names)} x {first.name}, {first.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    return [Check("train", "GPU", True, detail)]


def _communication() -> list[Check]:
    import torch.distributed as dist

    if not dist.is_available():
        return [Check("train", "distributed", False, "not in this torch", "install a torch built with distributed")]
    return [
        Check("train", "gloo", dist.is_gloo_available(), "collectives on CPU", "install a torch built with gloo"),
        Check("train", "nccl", dist.is_nccl_available(), "collectives on GPU", "install a CUDA build of torch"),
    ]


def _backends() -> list[Check]:
    compiler = next((found for name in ("g++", "clang++") if (found := shutil.which(name))), None)
    triton = installed("triton")
    return [
        Check("backends", "step, eager", True, "run the graph operator by operator; step is the default on CPUs"),
        Check(
            "backends", "inductor on CPU", compiler is not None, compiler or "no C++ compiler",
            "install g++, for backend='inductor' and 'torch.compile'",
        ),
        Check(
            "backends", "inductor on GPU", triton is not None, f"triton {triton}" if triton else "no triton",
            "comes with CUDA builds of torch; the default backend on GPUs",
        ),
    ]  # fmt: skip


def _kernels(kernels: str | None) -> list[Check]:
    """Which implementation each operator gets here (omnicompile/kernels)."""
    import torch

    from omnicompile.kernels.overview import overview

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [Check("kernels", one.operator, True, one.line()) for one in overview(device, kernels)]


def installed(name: str) -> str | None:
    """Version of an installed distribution."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _text(checks: list[Check], usable: bool) -> str:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from omnicompile.report.terminal import render

    table = Table.grid(padding=(0, 2))
    for area in dict.fromkeys(check.area for check in checks):
        for index, check in enumerate(check for check in checks if check.area == area):
            mark = Text("ok", "green") if check.ok else Text("missing" if check.needed else "-", "yellow")
            detail = check.detail if check.ok else f"{check.detail}: {check.remedy}"
            table.add_row(Text(area if index == 0 else "", "bold cyan"), mark, check.name, detail)
    verdict = "planning does not work here: mend what is missing"
    if usable:
        gpus = any(check.name == "GPU" and check.ok for check in checks)
        place = "on GPUs" if gpus else "on CPU, for tests"
        verdict = f"planning works here, and `omnicompile verify`; training {place}"
    return render(Group(table, Text(f"\n{verdict}", "bold")), color=color_wanted())
