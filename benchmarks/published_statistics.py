"""Errors of predicted against published runs: by group, after one factor per publisher, and of rankings in sweeps.

Errors are predicted / measured - 1. A percentile lies between two rows in proportion.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from published_runs import Outcome

SWEEP_LAYOUTS, SWEEP_TOLERANCE = 4, 0.03


@dataclass(frozen=True)
class Errors:
    """Of a group of rows: median and 90th percentile of the error's size, and the median error with its sign."""

    rows: int
    median: float
    p90: float
    bias: float


@dataclass(frozen=True)
class Sweep:
    """Layouts of one model, machine, length and batch. regret: measured time of the predicted best over that of the
    measured best, - 1. by_chance: mean regret of the layouts, and the share of them that would be hits."""

    suite: str
    model: str
    gpus: int
    seq_len: int
    global_batch: int
    layouts: int
    predicted_best: str
    measured_best: str
    regret: float
    by_chance: tuple[float, float]

    @property
    def hit(self) -> bool:
        return self.regret <= SWEEP_TOLERANCE


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def errors(ratios: Sequence[float]) -> Errors:
    """ratios: predicted over measured, at least one."""
    sizes = [abs(r - 1) for r in ratios]
    return Errors(len(ratios), percentile(sizes, 0.5), percentile(sizes, 0.9), percentile(ratios, 0.5) - 1)


def factor(ratios: Sequence[float]) -> float:
    """The median of measured over predicted."""
    return 1.0 / percentile(ratios, 0.5)


def grouped(outcomes: Sequence[Outcome], key: Callable[[Outcome], Sequence[str]]) -> dict[str, list[Outcome]]:
    """Outcomes by each of their keys, in the order of the names."""
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        for name in key(outcome):
            groups[name].append(outcome)
    return dict(sorted(groups.items()))


def parallelism(outcome: Outcome) -> list[str]:
    """The kinds of parallelism of a run: each that is there, or how it is data parallel if there is none."""
    layout = outcome.layout
    kinds = [
        label
        for label, names in (("tp", ("tp",)), ("pp", ("pp",)), ("cp or sp", ("cp", "sp")), ("ep", ("ep",)))
        if any(int(layout.get(name, "1")) > 1 for name in names)
    ]
    sharded = layout.get("sharding", "fsdp") in ("fsdp", "hsdp")
    return kinds or ["fsdp alone" if sharded else "data parallel alone"]


def timed(outcomes: Sequence[Outcome], weak: bool = False) -> list[Outcome]:
    """Those with a predicted and a measured time; weak: only rows that do not count in totals, or only the others."""
    return [o for o in outcomes if o.ratio is not None and bool(o.spec.weak) == weak]


def ratios(outcomes: Sequence[Outcome]) -> list[float]:
    return [o.ratio for o in outcomes if o.ratio is not None]


def memory_ratios(outcomes: Sequence[Outcome]) -> list[float]:
    return [o.memory_ratio for o in outcomes if o.memory_ratio is not None]


def plain(values: Sequence[float]) -> Errors:
    """Errors as they are."""
    return errors(values)


def corrected(values: Sequence[float]) -> Errors:
    """Errors after the one factor of these rows."""
    scale = factor(values)
    return errors([v * scale for v in values])


def corrected_by_others(values: Sequence[float]) -> Errors | None:
    """Errors after a factor that, for each row, is that of the other rows; None for a single row."""
    if len(values) < 2:
        return None
    others = (factor([*values[:i], *values[i + 1 :]]) for i in range(len(values)))
    return errors([v * scale for v, scale in zip(values, others)])


Correction = Callable[[Sequence[float]], Errors | None]


def headline(outcomes: Sequence[Outcome], correction: Correction) -> Errors | None:
    """Of step time over H100 and A100 rows, see `over_publishers`."""
    return over_publishers([o for o in timed(outcomes) if is_h100_or_a100(o)], ratios, correction)


def memory_headline(outcomes: Sequence[Outcome], correction: Correction) -> Errors | None:
    """Of peak memory over all rows that count, see `over_publishers`."""
    rows = [o for o in outcomes if o.memory_ratio is not None and not o.spec.weak]
    return over_publishers(rows, memory_ratios, correction)


def over_publishers(
    rows: Sequence[Outcome], values_of: Callable[[Sequence[Outcome]], list[float]], correction: Correction
) -> Errors | None:
    """Medians over publishers of their median, 90th percentile and bias."""
    groups = grouped(rows, lambda o: [o.spec.suite]).values()
    found = [e for group in groups if (e := correction(values_of(group))) is not None]
    if not found:
        return None
    parts = [[e.median for e in found], [e.p90 for e in found], [e.bias for e in found]]
    median, p90, bias = (percentile(part, 0.5) for part in parts)
    return Errors(len(rows), median, p90, bias)


def is_h100_or_a100(outcome: Outcome) -> bool:
    return any(name in outcome.spec.gpu_text for name in ("H100", "A100"))


def sweeps(outcomes: Sequence[Outcome]) -> list[Sweep]:
    """Groups of at least four different layouts of the same work on the same machine. A layout that was measured more
    than once, which has one price, counts once, at its median."""
    groups: dict[tuple[object, ...], list[Outcome]] = defaultdict(list)
    for o in timed(outcomes):
        s = o.spec
        groups[s.suite, s.model.name, s.model.config, s.gpu_text, s.gpus, s.seq_len, s.global_batch].append(o)
    return [_sweep(group) for group in groups.values() if len({_layout(o) for o in group}) >= SWEEP_LAYOUTS]


def _sweep(group: list[Outcome]) -> Sweep:
    spec = group[0].spec
    layouts: dict[tuple[tuple[str, str], ...], list[Outcome]] = defaultdict(list)
    for outcome in group:
        layouts[_layout(outcome)].append(outcome)
    took = {key: percentile([o.spec.seconds or math.inf for o in same], 0.5) for key, same in layouts.items()}
    predicted = min(layouts, key=lambda key: layouts[key][0].seconds)
    measured = min(took, key=lambda key: took[key])
    regrets = [seconds / took[measured] - 1 for seconds in took.values()]
    hits = sum(regret <= SWEEP_TOLERANCE for regret in regrets)
    return Sweep(
        spec.suite, spec.model.name, spec.gpus, spec.seq_len, spec.global_batch, len(layouts),
        layouts[predicted][0].spec.id, layouts[measured][0].spec.id, took[predicted] / took[measured] - 1,
        (sum(regrets) / len(regrets), hits / len(regrets)),
    )  # fmt: skip


def _layout(outcome: Outcome) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(outcome.layout.items()))


def likely_cause(outcome: Outcome) -> str:
    """A guess at what a large error comes from, by rule: what weighs in the prediction and is known to be hard."""
    prediction, spec = outcome.prediction, outcome.spec
    assert prediction is not None
    shares = {kind: seconds / prediction.step_seconds for kind, seconds in prediction.time.items()}
    degree = {name: int(outcome.layout.get(name, "1")) for name in ("tp", "cp", "sp", "ep", "pp")}
    rows = spec.layout.micro_batch * spec.seq_len / (degree["tp"] * degree["cp"] * degree["sp"])
    exposed = {k: v for k, v in shares.items() if k.startswith("exposed") and "pipeline" not in k}
    worst = max(exposed, key=lambda k: exposed[k], default="")
    waiting = sum(v for k, v in shares.items() if "pipeline" in k)
    compute = shares.get("compute", 0) + shares.get("recompute", 0)
    guesses = (
        (waiting > 0.15, f"pipeline waits {waiting:.0%}"),
        (bool(worst) and exposed[worst] > 0.2, f"{worst} {exposed.get(worst, 0):.0%}"),
        (degree["ep"] > 1, f"experts over {degree['ep']} ranks"),
        (degree["cp"] > 1, "ring attention"),
        (spec.model.size("hidden") <= 2048, "small model: launches and elementwise work"),
        (rows < 2048, f"{rows:.0f} tokens of a micro-batch a GPU"),
        (outcome.layout.get("gemm_dtype") == "float8", "fp8 linears: casts and scaling"),
        (spec.seq_len >= 32768, "long sequence: attention kernel"),
        (outcome.layout.get("attention_kernel") == "unfused", "unfused attention"),
        (outcome.layout.get("compiled") == "false", "elementwise work not compiled"),
        (compute > 0.8, "compute"),
    )
    return ", ".join([text for found, text in guesses if found][:3])
