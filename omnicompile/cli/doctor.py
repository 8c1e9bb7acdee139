"""`omnicompile doctor`: what this installation and machine can do, and what to install for the rest."""

from __future__ import annotations

import argparse
import json
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

The exit code is 0 when planning works here, 2 when it does not.
"""
PYTHON = ((3, 11), (3, 13))
TORCH = ((2, 11), (2, 13))
REQUIRED = ("transformers", "sympy", "networkx", "scipy", "numpy", "pyyaml", "rich", "safetensors")


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


def run(args: argparse.Namespace) -> int:
    checks = all_checks()
    usable = all(check.ok for check in checks if check.needed)
    if args.json:
        emit(json.dumps({"usable": usable, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        emit(_text(checks, usable))
    return 0 if usable else 2


def all_checks() -> list[Check]:
    checks = [_python(), _torch(), *(_package(name) for name in REQUIRED)]
    if find_spec("torch") is None:
        return checks
    return [*checks, *_devices(), *_communication(), *_compilers(), *_kernels()]


def _python() -> Check:
    here = sys.version_info[:2]
    wanted = f"{PYTHON[0][0]}.{PYTHON[0][1]} to {PYTHON[1][0]}.{PYTHON[1][1]}"
    ok = PYTHON[0] <= here <= PYTHON[1]
    return Check("plan", "python", ok, f"{here[0]}.{here[1]}", f"use Python {wanted}", needed=True)


def _torch() -> Check:
    found = installed("torch")
    if found is None:
        return Check("plan", "torch", False, "not installed", "pip install torch", needed=True)
    release = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    wanted = f"{TORCH[0][0]}.{TORCH[0][1]} to {TORCH[1][0]}.{TORCH[1][1]}"
    ok = TORCH[0] <= release <= TORCH[1]
    return Check("plan", "torch", ok, found, f"install torch {wanted}", needed=True)


def _package(name: str) -> Check:
    found = installed(name)
    return Check("plan", name, found is not None, found or "not installed", f"pip install {name}", needed=True)


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


def _compilers() -> list[Check]:
    compiler = next((found for name in ("g++", "clang++") if (found := shutil.which(name))), None)
    triton = installed("triton")
    return [
        Check("train", "C++ compiler", compiler is not None, compiler or "none", "install g++, for Inductor on CPU"),
        Check("train", "triton", triton is not None, triton or "not installed", "comes with CUDA builds of torch"),
    ]


def _kernels() -> list[Check]:
    checks = []
    for name, what in (("flash-attn", "attention of packed sequences"), ("liger-kernel", "fused norms and losses")):
        found = installed(name)
        remedy = f"pip install 'omnicompile[gpu]' ({what}); without it torch's own kernels are used"
        checks.append(Check("kernels", name, found is not None, found or "not installed", remedy))
    return checks


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
    verdict = "planning works here" if usable else "planning does not work here: mend what is missing"
    return render(Group(table, Text(f"\n{verdict}", "bold")), color=color_wanted())
