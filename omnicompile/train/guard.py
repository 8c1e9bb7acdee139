"""Steps whose loss or gradient is not finite."""

from __future__ import annotations

from collections.abc import Sequence

from omnicompile.errors import OmniCompileError
from omnicompile.train.step import StepResult

_SHOWN = 8


class TrainingError(OmniCompileError):
    """A training run that cannot go on: a loss that is not finite, a data set without samples."""


class FiniteGuard:
    """Lets `allowed` steps be left out. skipped: so far."""

    def __init__(self, allowed: int) -> None:
        self._allowed = allowed
        self.skipped = 0

    def check(self, step: int, result: StepResult, samples: Sequence[str]) -> bool:
        """Whether the step was taken. samples: as they are to be named. Raises TrainingError for one more than allowed,
        naming step and samples."""
        if result.taken:
            return True
        self.skipped += 1
        if self.skipped <= self._allowed:
            return False
        raise TrainingError(f"step {step}: {not_finite(result)}, in {samples_text(samples)}{self._remedy(result)}")

    def _remedy(self, result: StepResult) -> str:
        before = f" ({self._allowed} were left out before)" if self._allowed else ""
        return (
            f"{before}; no weight has changed in this step: look at these samples, lower the learning rate, or let "
            "some steps be left out with --set skip_nonfinite=N"
        )


def not_finite(result: StepResult) -> str:
    """What of a step is not finite."""
    if result.loss == result.loss and abs(result.loss) != float("inf"):
        return f"the gradient norm is {result.grad_norm} (the loss is {result.loss:.5g})"
    bad = [number for number, loss in enumerate(result.micro_losses) if loss != loss or abs(loss) == float("inf")]
    where = f" in micro-step {', '.join(map(str, bad))}" if len(result.micro_losses) > 1 else ""
    return f"the loss is {result.loss}{where}"


def samples_text(samples: Sequence[str]) -> str:
    shown = ", ".join(samples[:_SHOWN])
    more = f" and {len(samples) - _SHOWN} more" if len(samples) > _SHOWN else ""
    return f"samples {shown}{more}" if samples else "its samples"
