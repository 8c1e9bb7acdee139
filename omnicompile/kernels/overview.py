"""What of the implementations is available on a device, what would be picked, and what the rest lacks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from omnicompile.kernels.choice import KernelChoice
from omnicompile.kernels.registry import CPU, Kernel
from omnicompile.kernels.table import OPERATORS, find_kernel, kernels_of


@dataclass(frozen=True)
class OperatorOverview:
    """picked: the name that was asked for, or that is taken without measurements. measured: whether, of several that
    are available, the fastest is found for each shape. missing: why, by name of what is not available."""

    operator: str
    picked: str
    measured: bool
    available: tuple[str, ...]
    missing: dict[str, str]

    def line(self) -> str:
        how = "the fastest for each shape" if self.measured else self.picked
        others = [name for name in self.available if self.measured or name != self.picked]
        text = f"{how}; also available: {', '.join(others)}" if others and not self.measured else how
        if self.measured:
            text = f"{how} of {', '.join(others)}"
        return text + "".join(f"; not {name}: {why}" for name, why in self.missing.items())


def overview(device: torch.device, kernels: str | None = None) -> list[OperatorOverview]:
    """One for each operator. kernels: what is asked for, as --kernels takes it; raises InputError as `KernelChoice.of`
    does."""
    choice = KernelChoice.of(kernels, device)
    return [_of(operator, choice) for operator in OPERATORS]


def _of(operator: str, choice: KernelChoice) -> OperatorOverview:
    missing = {kernel.name: kernel.missing(choice.hardware) for kernel in kernels_of(operator)}
    available = tuple(name for name, why in missing.items() if not why)
    forced = choice.forced.get(operator)
    fast = [name for name in available if name != "reference"]
    measured = forced is None and choice.hardware != CPU and len(fast) > 1
    # What runs on other hardware alone, or on this for tests alone, is not worth a word.
    wanting = {name: why for name, why in missing.items() if why and _is_for(find_kernel(operator, name), choice)}
    return OperatorOverview(operator, forced or available[0], measured, available, wanting)


def _is_for(kernel: Kernel, choice: KernelChoice) -> bool:
    return choice.hardware in kernel.hardware and not (kernel.interpreted and choice.hardware == CPU)
