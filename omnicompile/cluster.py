"""The machines that a plan is made for."""

from __future__ import annotations

from dataclasses import dataclass

from omnicompile.errors import InputError


@dataclass(frozen=True)
class Cluster:
    """`gpus` equal accelerators, in nodes of `gpus_per_node`.

    gpu: name of a hardware file in `cost_model/hardware` ("h100", "a100", ...) or the path of one's own.
    price_per_gpu_hour: currency units per GPU-hour, for the cost lines of a report; None leaves them out.
    """

    gpus: int
    gpu: str = "h100"
    gpus_per_node: int = 8
    price_per_gpu_hour: float | None = None

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise InputError(f"--gpus must be at least 1, got {self.gpus}")
        if self.gpus_per_node < 1:
            raise InputError(f"--gpus-per-node must be at least 1, got {self.gpus_per_node}")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise InputError(
                f"{self.gpus} GPUs are not whole nodes of {self.gpus_per_node}: "
                f"use a multiple of {self.gpus_per_node}, or set --gpus-per-node"
            )

    @property
    def nodes(self) -> int:
        return max(1, -(-self.gpus // self.gpus_per_node))
