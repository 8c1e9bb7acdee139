"""The options of a training run, as a `train:` section holds them. The dataclasses are the schema."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from omnicompile.errors import InputError


class OptimizerKind(StrEnum):
    ADAMW = "adamw"
    MUON = "muon"  # for the weight matrices of linear layers, AdamW for everything else


class ScheduleKind(StrEnum):
    CONSTANT = "constant"
    LINEAR = "linear"  # down to `final` at the last step
    COSINE = "cosine"  # half a cosine down to `final` at the last step
    WSD = "wsd"  # stays, then goes down linearly over the last `decay` steps


@dataclass(frozen=True)
class OptimizerOptions:
    """lr: of AdamW, and of Muon, whose updates are scaled to have the size of AdamW's. betas, eps: of AdamW.
    momentum: of Muon. weight_decay: decoupled; of matrices and embeddings, not of norms and biases.
    adamw: patterns of parameter names that Muon leaves to AdamW, besides embeddings and all that are no matrices."""

    name: OptimizerKind = OptimizerKind.ADAMW
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    momentum: float = 0.95
    adamw: tuple[str, ...] = ("lm_head*", "*.lm_head*", "head*", "*.head*", "classifier*", "*.classifier*")

    def __post_init__(self) -> None:
        _require("optimizer.lr", self.lr, self.lr > 0, "positive")
        _require("optimizer.eps", self.eps, self.eps > 0, "positive")
        _require("optimizer.weight_decay", self.weight_decay, self.weight_decay >= 0, "at least 0")
        for name, value in (("betas", self.betas[0]), ("betas", self.betas[1]), ("momentum", self.momentum)):
            _require(f"optimizer.{name}", value, 0 <= value < 1, "at least 0 and below 1")


@dataclass(frozen=True)
class ScheduleOptions:
    """kind: of the learning rate after `warmup` steps of linear growth. final: the last step's learning rate as a share
    of `lr`. decay: steps of the way down (wsd; None: a tenth of all)."""

    kind: ScheduleKind = ScheduleKind.CONSTANT
    warmup: int = 0
    final: float = 0.0
    decay: int | None = None

    def __post_init__(self) -> None:
        _require("schedule.warmup", self.warmup, self.warmup >= 0, "at least 0")
        _require("schedule.final", self.final, 0 <= self.final <= 1, "between 0 and 1")
        if self.decay is not None:
            _require("schedule.decay", self.decay, self.decay >= 1, "at least 1")
            if self.kind is not ScheduleKind.WSD:
                raise InputError(f"schedule.decay goes with kind: wsd, not with {self.kind}")


@dataclass(frozen=True)
class EvaluationOptions:
    """data: as `--data` takes it; None: no evaluation. every: steps between two. steps: most steps of one; None: the
    whole data set. The end of training is evaluated too."""

    data: str | None = None
    every: int = 500
    steps: int | None = None

    def __post_init__(self) -> None:
        _require("evaluation.every", self.every, self.every >= 1, "at least 1")
        if self.steps is not None:
            _require("evaluation.steps", self.steps, self.steps >= 1, "at least 1")


@dataclass(frozen=True)
class TrainOptions:
    """steps, epochs: training ends at whichever comes first; with neither, after one epoch. A schedule that goes down
    needs `steps`.
    clip: of the gradient norm; None: not clipped. freeze: patterns of parameter or module names that are not trained.
    accumulation: micro-steps of a step; None: the plan's. skip_nonfinite: steps whose loss or gradient is not finite
    that are left out, weights unchanged, before training ends with an error.
    checkpoint_every: steps between two checkpoints; None: at the end only. keep_last: checkpoints that are kept.
    log_every: steps between two lines of progress. log_samples: write which samples every step saw to samples.jsonl.
    seed: of the model's initialization, of dropout and of the order of the data."""

    steps: int | None = None
    epochs: int | None = None
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    clip: float | None = 1.0
    freeze: tuple[str, ...] = ()
    accumulation: int | None = None
    skip_nonfinite: int = 0
    checkpoint_every: int | None = None
    keep_last: int = 3
    log_every: int = 1
    log_samples: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "epochs", "accumulation", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None:
                _require(name, value, value >= 1, "at least 1")
        for name in ("keep_last", "log_every"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("skip_nonfinite", "seed"):
            _require(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        if self.clip is not None:
            _require("clip", self.clip, self.clip > 0, "positive (leave it out for none)")
        if self.schedule.kind is not ScheduleKind.CONSTANT and self.steps is None:
            raise InputError(f"schedule.kind {self.schedule.kind} needs `steps`: where the learning rate goes down to")
        if self.steps is not None and self.schedule.warmup + (self.schedule.decay or 0) > self.steps:
            raise InputError(
                f"schedule.warmup and schedule.decay take {self.schedule.warmup + (self.schedule.decay or 0)} steps, "
                f"and training has {self.steps}"
            )


def _require(name: str, value: float, holds: bool, what: str) -> None:
    if not holds:
        raise InputError(f"{name} must be {what}, got {value:g}")
