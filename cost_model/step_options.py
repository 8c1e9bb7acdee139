"""Choices of a plan that concern the whole step, as costs need them."""

from __future__ import annotations

from dataclasses import dataclass, field

from omnicompile.cost_model.step_price import DTYPE_BYTES
from omnicompile.plan import OURS, LossHead, Overlap, Stack


@dataclass(frozen=True)
class StepOptions:
    """Choices that concern the whole step. Byte sizes of one parameter in compute and of one reduced gradient.
    pipelined: the model is cut into stages, whose parameters that are not resharded stay whole through the step.
    accumulates: gradients of earlier micro-steps are there from the start (or buffers for them, in other stacks).
    overlap: what is done so that communication runs beside compute."""

    micro_batch: int
    loss_head: LossHead
    param_bytes: int = 2
    reduce_bytes: int = 4
    stack: Stack = OURS
    pipelined: bool = False
    accumulates: bool = True
    overlap: Overlap = field(default_factory=Overlap)

    @property
    def master_bytes(self) -> int:
        """Of a master weight."""
        return DTYPE_BYTES[self.stack.master_dtype]

    @property
    def sums_inside(self) -> bool:
        """Whether gradients are summed over replicas beside the backward of the last micro-step."""
        return self.stack.overlap_gradients or self.overlap.replica_sums

    @property
    def moment_bytes(self) -> int:
        """Of AdamW's two moments of a weight."""
        return 2 * DTYPE_BYTES[self.stack.moment_dtype]
