"""Master weights and the optimizer's state in host memory, compute weights on the device (`offload_optimizer`).

The module's parameters are the master weights: float32 shards on the host. So the ordinary loop stays as it is, and any
torch optimizer made of `module.parameters()` keeps its moments on the host, updates there (AdamW: `fused=True`), and is
saved and loaded by the checkpoints of docs/checkpoints.md like any other. What moves, once in a step each:

    backward: gradients, complete and summed over ranks, device -> host    forward: updated weights, host -> device

Within a window of `module.accumulate` gradients are added up on the device and leave it after the last micro-step.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from omnicompile.errors import PlanError
from omnicompile.passes.offload_op import host_empty_like
from omnicompile.passes.rank_program import ParamSpec
from omnicompile.plan import Plan
from omnicompile.runtime.mesh import RuntimeMesh
from omnicompile.runtime.parameters import ParameterStore


class HostStore(ParameterStore):
    """Master shards in host memory by model name, and compute weights made of them. compute: their dtype."""

    def __init__(self, mesh: RuntimeMesh, specs: Mapping[str, ParamSpec], compute: torch.dtype) -> None:
        super().__init__(mesh, specs)
        self.home = torch.device("cpu")
        self._compute = compute
        self._on_device: dict[str, Tensor] = {}
        self._version = -1
        self._stepped = False  # gradients have been given out since the weights came in

    def new_shard(self, spec: ParamSpec) -> Tensor:
        shape = spec.local_shape(self.mesh.mesh)
        if self.mesh.device.type != "cpu":
            return torch.zeros(shape, dtype=spec.dtype)
        return host_empty_like(torch.empty(shape, dtype=spec.dtype, device="cpu")).zero_()

    def weights(self) -> Mapping[str, Tensor]:
        """Compute weights on the device, as the master weights are now: copied again if these have been written, or
        may have been by an optimizer that writes to their `.data`."""
        version = sum(parameter._version for parameter in self.local.values())
        if self._stepped or version != self._version:
            with torch.no_grad():
                for name, master in self.local.items():
                    self._bring_in(name, master.detach())
            self._version, self._stepped = version, False
        return self._on_device

    def _bring_in(self, name: str, master: Tensor) -> None:
        dtype = self._compute if master.is_floating_point() else master.dtype
        if name not in self._on_device:
            self._on_device[name] = torch.empty_like(master, dtype=dtype, device=self.mesh.device)
        weight = self._on_device[name]
        if weight.device.type == "cpu":
            weight.copy_(master)
            return
        staged = host_empty_like(weight)  # cast on the host: fewer bytes travel, and no copy waits for another
        weight.copy_(staged.copy_(master), non_blocking=True)

    def give_out(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients in host memory, there when this returns."""
        host: list[Tensor | None] = []
        for gradient, master in zip(gradients, self.local.values()):
            if gradient is None:
                host.append(None)
                continue
            copied = host_empty_like(gradient, master.dtype)
            host.append(copied.copy_(gradient, non_blocking=True))
        if self.mesh.device.type != "cpu":
            torch.cuda.current_stream(self.mesh.device).synchronize()
        self._stepped = self._stepped or any(value is not None for value in host)
        return host


def check_backend(plan: Plan, stored: torch.dtype, step_graph: bool) -> None:
    """step_graph: whether the backend runs forward and backward as one graph. Warns of activation offload that it
    leaves undone; raises PlanError for an offloaded optimizer that it cannot serve."""
    if step_graph:
        return
    use = 'use backend="inductor" or "step"'
    if plan.offload_optimizer and plan.param_dtype != str(stored).removeprefix("torch."):
        raise PlanError(
            f"the plan keeps {stored} master weights on the host and computes in {plan.param_dtype}, but gradients of "
            f"this backend come in the compute dtype: {use}"
        )
    if offloaded := sorted(name for name, block in plan.blocks.items() if block.offload):
        warnings.warn(
            f"the plan offloads activations of {', '.join(offloaded)}; this backend keeps them on the device, with "
            f"equal results and more memory: {use}",
            stacklevel=4,
        )
