"""Learning rates over the steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omnicompile.errors import InputError
from omnicompile.train import ScheduleKind, ScheduleOptions, make_schedule
from omnicompile.train.schedule import lr_factor

KINDS = st.sampled_from(list(ScheduleKind))


@given(KINDS, st.integers(0, 20), st.integers(1, 60), st.floats(0, 1))
def test_a_schedule_grows_then_stays_or_falls_to_its_end(
    kind: ScheduleKind, warmup: int, after: int, final: float
) -> None:
    steps, options = warmup + after, ScheduleOptions(kind, warmup=warmup, final=final)
    factors = [lr_factor(options, steps, step) for step in range(steps)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert factors[:warmup] == sorted(factors[:warmup]) and all(f < 1 for f in factors[:warmup])
    assert all(a >= b - 1e-12 for a, b in zip(factors[warmup:], factors[warmup + 1 :]))
    if after > 1 and kind is not ScheduleKind.CONSTANT:
        assert factors[-1] == pytest.approx(final)


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        (ScheduleKind.CONSTANT, [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1]),
        (ScheduleKind.LINEAR, [1 / 3, 2 / 3, 1, 0.8, 0.6, 0.4, 0.2, 0]),
        (ScheduleKind.COSINE, [1 / 3, 2 / 3, 1, 0.904508, 0.654508, 0.345492, 0.095492, 0]),
        (ScheduleKind.WSD, [1 / 3, 2 / 3, 1, 1, 1, 2 / 3, 1 / 3, 0]),
    ],
)
def test_the_shapes(kind: ScheduleKind, want: list[float]) -> None:
    decay = 3 if kind is ScheduleKind.WSD else None
    options = ScheduleOptions(kind, warmup=2, decay=decay)
    assert [lr_factor(options, 8, step) for step in range(8)] == pytest.approx(want, abs=1e-6)


def test_a_schedule_that_goes_on_gives_the_same_rates() -> None:
    options = ScheduleOptions(ScheduleKind.COSINE, warmup=3)

    def rates(done: int) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
        schedule = make_schedule(optimizer, options, 10, done)
        found = []
        for _ in range(done, 10):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return found

    assert rates(4) == pytest.approx(rates(0)[4:])


def test_a_schedule_with_an_end_needs_to_know_it() -> None:
    with pytest.raises(InputError, match="number of steps"):
        make_schedule(
            torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), ScheduleOptions(ScheduleKind.LINEAR)
        )
