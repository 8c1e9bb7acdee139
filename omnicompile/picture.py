"""What a page draws of a plan beyond the Plan itself: who communicates, who holds memory, the tasks of a step, and how
the plan changes with its size. Data only: the planner computes it (`planner/picture.py`, `planner/sweep.py`)."""

from __future__ import annotations

from dataclasses import dataclass

from omnicompile.plan import Plan


@dataclass(frozen=True)
class Transfer:
    """Communication of one kind that a block issues in an optimizer step.

    kind: "all_gather", ...; purpose: what is moved, in words; stream: "intra", "inter" (inside a node, between nodes)
    or "copy". count: how many of them. exposed: seconds that compute waits for them; hidden: the rest of their seconds.
    """

    block: str
    kind: str
    purpose: str
    stream: str
    count: int
    exposed: float
    hidden: float

    @property
    def seconds(self) -> float:
        return self.exposed + self.hidden


@dataclass(frozen=True)
class Flow:
    """Activations of `nbytes` that go from one block to another in a micro-batch."""

    source: str
    target: str
    nbytes: float


@dataclass(frozen=True)
class StepTask:
    """A task of the last micro-step that takes any time, seconds from its begin. kind: as in a Schedule."""

    name: str
    stream: str
    kind: str
    block: str
    start: float
    end: float


@dataclass(frozen=True)
class Stretch:
    """A part of the last micro-step: the "forward" or "backward" of a block, or the "update"."""

    phase: str
    block: str
    start: float
    end: float


@dataclass(frozen=True)
class Picture:
    """One plan's step from inside. memory: bytes at the peak by block and kind. tasks, stretches: of the step's last
    micro-step, which takes `seconds`."""

    transfers: tuple[Transfer, ...]
    flows: tuple[Flow, ...]
    memory: dict[str, dict[str, float]]
    tasks: tuple[StepTask, ...]
    stretches: tuple[Stretch, ...]
    seconds: float


@dataclass(frozen=True)
class Point:
    """A plan at another size. plan: priced; None where there is none. reason: why there is none, or why it does not
    fit ("" where it does)."""

    value: int
    plan: Plan | None
    reason: str = ""

    @property
    def fits(self) -> bool:
        return self.plan is not None and self.plan.prediction is not None and self.plan.prediction.fits


@dataclass(frozen=True)
class Curve:
    """Plans over sizes, by rising value. axis: "seq_len" or "gpus". planned: the fastest plan of each size (empty: not
    searched for). kept: one plan's choices at each size. now: the size of that plan."""

    axis: str
    now: int
    planned: tuple[Point, ...]
    kept: tuple[Point, ...]
