"""What a `train:` section may say."""

from __future__ import annotations

import pytest

from omnicompile.errors import InputError
from omnicompile.schema import Place, decode, encode
from omnicompile.train.options import EvaluationOptions, OptimizerOptions, ScheduleKind, ScheduleOptions, TrainOptions


def test_options_survive_being_written_and_read() -> None:
    options = TrainOptions(
        steps=100,
        optimizer=OptimizerOptions(lr=3e-4, betas=(0.9, 0.99)),
        schedule=ScheduleOptions(ScheduleKind.WSD, warmup=5, decay=10),
        evaluation=EvaluationOptions(data="other.jsonl", steps=3),
        freeze=("model.visual",),
        clip=None,
    )
    assert decode(TrainOptions, encode(options), Place("train.yaml")) == options


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TrainOptions(steps=0), "steps must be at least 1"),
        (lambda: TrainOptions(clip=0.0), "clip must be positive"),
        (lambda: TrainOptions(skip_nonfinite=-1), "skip_nonfinite"),
        (lambda: TrainOptions(schedule=ScheduleOptions(ScheduleKind.COSINE)), "needs `steps`"),
        (lambda: TrainOptions(steps=4, schedule=ScheduleOptions(ScheduleKind.WSD, 3, decay=2)), "take 5 steps"),
        (lambda: ScheduleOptions(decay=3), "goes with kind: wsd"),
        (lambda: ScheduleOptions(final=1.5), "between 0 and 1"),
        (lambda: OptimizerOptions(lr=0.0), "optimizer.lr must be positive"),
        (lambda: OptimizerOptions(betas=(0.9, 1.0)), "betas must be at least 0 and below 1"),
        (lambda: EvaluationOptions(every=0), "evaluation.every"),
    ],
)
def test_values_without_sense_are_refused(make: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make()  # type: ignore[operator]
