"""What an implementation of an operator says of itself, and whether it is available here.

An implementation is found by (operator, variant, implementation, hardware). Hardware is "cpu", or "sm80", "sm90", ...
for CUDA devices of compute capability 8.x, 9.x, ...
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch

CPU = "cpu"
INDUCTOR = "inductor"  # leaves an operator to the compiler: nothing is replaced
_INTERPRETER = "TRITON_INTERPRET"

Key = tuple[str, str, str, str]


@dataclass(frozen=True)
class Package:
    """What must be installed: a distribution of at least a version, with a module. A module of torch needs no
    distribution of its own. install: what to type for it."""

    module: str
    distribution: str = ""
    at_least: str = ""
    install: str = ""

    def missing(self) -> str:
        """What is missing, and how to get it; "" if nothing is."""
        wanted = self.distribution or self.module
        remedy = f" ({self.install})" if self.install else ""
        if not _has_module(self.module):
            return f"{wanted} is not installed{remedy}"
        found = version_of(self.distribution)
        if found is not None and self.at_least and _numbers(found) < _numbers(self.at_least):
            return f"{wanted} {found} is installed, {self.at_least} or later is needed{remedy}"
        return ""


@cache
def _has_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ImportError:  # of a parent
        return False


@cache
def version_of(distribution: str) -> str | None:
    try:
        return version(distribution) if distribution else None
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split("+")[0].split(".")[:3]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)


@dataclass(frozen=True)
class Functions:
    """forward and backward of an implementation, as the operator calls them (see operators.py and anchors/)."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


@dataclass(frozen=True)
class Problem:
    """One use of an operator. shape: sizes in the order that the operator's sample takes (samples.py). facts: what
    not every implementation can do ("softcap", "sinks", "unequal_heads", ...)."""

    operator: str
    variant: str
    hardware: str
    dtype: torch.dtype
    shape: tuple[int, ...] = ()
    head_size: int = 0
    facts: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Kernel:
    """An implementation.

    variants, hardware, dtypes: what it is for; no dtypes stands for all floating-point ones. packages: what it takes.
    largest_head, head_multiple, smallest_head: limits on the size of heads. can: facts of a problem that it handles.
    module: where its functions are (`module` or `module:name`), imported when first used; "" for `inductor`, which has
    none. interpreted: on CPUs it runs by Triton's interpreter alone, for tests. about: a line for `omnicompile doctor`.
    """

    operator: str
    name: str
    variants: tuple[str, ...]
    hardware: tuple[str, ...]
    module: str = ""
    packages: tuple[Package, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    largest_head: int = 0
    head_multiple: int = 1
    can: frozenset[str] = field(default_factory=frozenset)
    interpreted: bool = False
    about: str = ""
    smallest_head: int = 0

    def places(self) -> list[Key]:
        """Where it stands in the registry."""
        return [(self.operator, variant, self.name, place) for variant in self.variants for place in self.hardware]

    def missing(self, hardware: str) -> str:
        """Why it cannot run on this hardware at all; "" if it can."""
        if hardware not in self.hardware:
            return f"it runs on {', '.join(self.hardware)}, and this is {hardware}"
        if self.interpreted and hardware == CPU and os.environ.get(_INTERPRETER) != "1":
            return f"on CPUs it runs by Triton's interpreter alone, for tests ({_INTERPRETER}=1)"
        return "; ".join(filter(None, (package.missing() for package in self.packages)))

    def refuses(self, problem: Problem) -> str:
        """Why it does not compute this problem, on hardware that it runs on; "" if it does."""
        if problem.variant not in self.variants:
            return f"it has no variant {problem.variant}"
        if self.dtypes and problem.dtype not in self.dtypes:
            return f"it computes in {', '.join(map(_name, self.dtypes))}, not in {_name(problem.dtype)}"
        if self.interpreted and problem.hardware == CPU and problem.dtype != torch.float32:
            return "Triton's interpreter has no arithmetic but float32's"
        if unable := problem.facts - self.can:
            return f"it cannot do {', '.join(sorted(unable))}"
        size = problem.head_size
        if size < self.smallest_head:
            return f"heads of size {size} are smaller than {self.smallest_head}"
        if self.largest_head and (size > self.largest_head or size % self.head_multiple):
            return f"heads of size {size} are not a multiple of {self.head_multiple} up to {self.largest_head}"
        return ""

    def unable(self, problem: Problem) -> str:
        return self.missing(problem.hardware) or self.refuses(problem)

    def functions(self) -> Functions:
        """Imported now. Raises ImportError where the packages are not there."""
        module, _, name = self.module.partition(":")
        found = vars(importlib.import_module(module))[name or "FUNCTIONS"]
        assert isinstance(found, Functions)
        return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def hardware_of(device: torch.device) -> str:
    """ "cpu", or the major compute capability of a CUDA device: "sm90" of an H100."""
    if device.type != "cuda":
        return CPU
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _capability(index: int) -> str:
    return f"sm{torch.cuda.get_device_capability(index)[0]}0"
