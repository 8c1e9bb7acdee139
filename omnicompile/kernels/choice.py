"""Which implementation is taken: the one that was asked for, else the fastest measured, else the first available."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from omnicompile.errors import InputError
from omnicompile.kernels.registry import CPU, Kernel, Problem, hardware_of
from omnicompile.kernels.table import OPERATORS, VARIANTS, able_kernels, find_kernel, kernels_of

if TYPE_CHECKING:
    from omnicompile.kernels.measure import Measurements

# Gives every rank the name that one of them found.
Agree = Callable[[Callable[[], str]], str]


def parse_kernels(text: str | Mapping[str, str] | None) -> dict[str, str]:
    """ "attention=flash_attn2,attention.packed=torch_varlen" (or the same as a mapping) -> name by operator.

    Raises InputError for an operator, variant or implementation that there is not.
    """
    if not text:
        return {}
    pairs = text.items() if isinstance(text, Mapping) else map(_pair, text.split(","))
    found: dict[str, str] = {}
    for place, name in pairs:
        _check(place, name)
        if found.setdefault(place, name) != name:
            raise InputError(f"--kernels names two implementations of {place}: {found[place]} and {name}")
    return found


def _pair(text: str) -> tuple[str, str]:
    place, equals, name = text.strip().partition("=")
    if not equals or not place or not name:
        raise InputError(f"--kernels takes OPERATOR=IMPLEMENTATION, separated by commas, not {text.strip()!r}")
    return place.strip(), name.strip()


def _check(place: str, name: str) -> None:
    operator, dot, variant = place.partition(".")
    _known(operator, OPERATORS, "operator")
    if dot:
        _known(variant, VARIANTS[operator], f"variant of {operator}")
    _known(name, [kernel.name for kernel in kernels_of(operator)], f"implementation of {operator}")


def _known(name: str, names: Iterable[str], what: str) -> None:
    names = list(names)
    if name not in names:
        close = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
        raise InputError(f"--kernels: no {what} {name!r}; {hint}")


@dataclass(frozen=True)
class KernelChoice:
    """forced: name by operator ("attention") or operator and variant ("attention.packed"), the latter counting more.
    hardware: of the device that the program is for. measurements: None takes the first available, as on CPUs."""

    forced: Mapping[str, str] = field(default_factory=dict)
    hardware: str = CPU
    measurements: Measurements | None = None
    agree: Agree = lambda find: find()

    @classmethod
    def of(
        cls, kernels: str | Mapping[str, str] | None, device: torch.device, agree: Agree = lambda find: find()
    ) -> KernelChoice:
        """Raises InputError for a name that there is not, and for an implementation that is not available here,
        saying what is missing."""
        forced, hardware = parse_kernels(kernels), hardware_of(device)
        for place, name in forced.items():
            if missing := find_kernel(place.partition(".")[0], name).missing(hardware):
                raise InputError(f"--kernels {place}={name} cannot be used here: {missing}")
        if hardware == CPU:
            return cls(forced, hardware, None, agree)
        from omnicompile.kernels.measure import Measurements

        return cls(forced, hardware, Measurements(device), agree)

    def asked(self, problem: Problem) -> str | None:
        return self.forced.get(f"{problem.operator}.{problem.variant}", self.forced.get(problem.operator))

    def pick(self, problem: Problem, where: str = "") -> Kernel:
        """where: the module that uses the operator, for messages. Raises InputError if the implementation that was
        asked for does not compute this."""
        name = self.asked(problem)
        if name is not None:
            kernel = find_kernel(problem.operator, name)
            if why := kernel.unable(problem):
                raise InputError(
                    f"--kernels {problem.operator}={name} does not fit {where or 'the model'}: {why}; name another for "
                    f"{problem.operator}.{problem.variant}, or leave it out"
                )
            return kernel
        able = self.able(problem)
        if self.measurements is None or len(able) == 1:
            return able[0]
        measurements = self.measurements
        return find_kernel(problem.operator, self.agree(lambda: measurements.fastest(problem, able).name))

    def able(self, problem: Problem) -> list[Kernel]:
        """What computes this here, in order. The reference counts only where nothing else does."""
        able = able_kernels(problem)
        return [kernel for kernel in able if kernel.name != "reference"] or able
