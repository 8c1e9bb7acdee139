"""Fit the constants that only whole training runs show, and cross-validate them by publisher.

    python benchmarks/calibrate_runs.py               # fit on all publishers, print the constants
    python benchmarks/calibrate_runs.py --held-out    # and once without each publisher: results/held_out.json
    python benchmarks/calibrate_runs.py --write       # put the constants into cost_model/hardware/*.yaml

Kernels and collectives are fitted on their own benchmarks (`calibrate_from_published.py`) and stay as they are. What is
fitted here are the few constants of `CONSTANTS`, on the logarithm of step time (soft L1), with the same weight for
every publisher whatever the number of its rows, at most ROWS of them, evenly spaced. A publisher's median error counts
less than the spread about it, as software stacks differ in speed. Each constant is drawn weakly to a prior, which
decides where the rows say nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from calibrate_from_published import HOPPER, YAML, _set
from numpy.typing import NDArray
from published_machines import with_first_flash
from published_rows import read_rows
from published_runs import Pricer, Transform, evaluate, note
from published_specs import RunSpec, specs_of
from scipy.optimize import least_squares

from omnicompile.cost_model.hardware import Hardware, load_hardware

HERE = Path(__file__).resolve().parent
HELD_OUT = HERE / "results" / "held_out.json"
ROWS = 20
PRIOR_WEIGHT = 0.3
MEDIAN_WEIGHT = 0.5
STEP = 0.05
SCALE = 0.1  # log error beyond which a row counts linearly

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Constant:
    """name: of the hardware file; machine: of the file, or "" for all. prior, spread: where it is drawn to and how
    weakly, in `unit`. low, high: bounds."""

    name: str
    machine: str
    unit: str
    prior: float
    spread: float
    low: float
    high: float
    meaning: str

    @property
    def label(self) -> str:
        return f"{self.name} {self.machine}".strip()


CONSTANTS = (
    Constant("sustained_fraction", "a100", "1", 0.9, 0.1, 0.5, 1.2, "rates through a step, of kernel benchmarks"),
    Constant("sustained_fraction", "h100", "1", 0.85, 0.1, 0.5, 1.2, "the same; also H200 and H800"),
    Constant("float8_gain", "h100", "1", 1.1, 0.15, 0.6, 1.5, "rate of fp8 with a scale per tensor, per block"),
    Constant("eager_traffic", "", "1", 2.0, 0.7, 1.0, 5.0, "bytes of element-wise work that is not compiled"),
    Constant("eager_seconds", "", "us", 15.0, 15.0, 0.0, 100.0, "floor of such a fused chain"),
    Constant("host_seconds", "", "us", 60.0, 50.0, 0.0, 300.0, "of the host to launch an operator"),
    Constant("fa1", "", "1", 0.5, 0.05, 0.3, 0.8, "rates of FlashAttention-1, of FlashAttention-2"),
    Constant("contention_factor", "", "1", 0.15, 0.1, 0.0, 0.6, "slowdown of compute beside collectives"),
)


def transform(values: Sequence[float]) -> Transform:
    """Hardware with the constants at `values` (in their units)."""
    named = {(c.name, c.machine): value for c, value in zip(CONSTANTS, values)}

    def change(spec: RunSpec, hardware: Hardware) -> Hardware:
        return with_constants(hardware, "a100" if spec.gpu == "a100" else "h100", named, spec)

    return change


def with_constants(
    hardware: Hardware, machine: str, named: dict[tuple[str, str], float], spec: RunSpec | None = None
) -> Hardware:
    """A run's own share of the sustained rates (its power limit) is kept."""
    limited = hardware.sustained_fraction / load_hardware(machine).sustained_fraction if spec is not None else 1.0
    hardware = with_first_flash(hardware, named["fa1", ""])
    return replace(
        hardware,
        sustained_fraction=named["sustained_fraction", machine] * limited,
        eager_traffic=named["eager_traffic", ""],
        eager_seconds=named["eager_seconds", ""] * 1e-6,
        host_seconds=named["host_seconds", ""] * 1e-6,
        contention_factor=named["contention_factor", ""],
        float8_gain=named["float8_gain", "h100"],
    )


def log_ratios(specs: Sequence[RunSpec], values: Sequence[float], pricer: Pricer) -> tuple[list[str], Vector]:
    """Of rows that are priced: the publisher, and log(predicted / measured)."""
    priced = [o for o in evaluate(specs, transform(values), pricer) if o.ratio is not None]
    return [o.spec.suite for o in priced], np.log([o.ratio or 1.0 for o in priced])


def residuals(suites: Sequence[str], logs: Vector) -> Vector:
    """Of every publisher, the log errors of its rows about their median, which together count as one row, and the
    median itself, which counts MEDIAN_WEIGHT."""
    names = np.array(suites)
    groups = [logs[names == suite] for suite in dict.fromkeys(suites)]
    medians = np.array([np.median(group) for group in groups])
    parts = [(group - m) / np.sqrt(len(group)) for group, m in zip(groups, medians)]
    return np.concatenate([*parts, MEDIAN_WEIGHT * medians])


PRIORS = np.array([c.prior for c in CONSTANTS])
SPREADS = np.array([c.spread for c in CONSTANTS])


def fit(errors: Callable[[Vector], Vector], start: Vector) -> Vector:
    """The constants at which `errors` of them, and their distance from the priors, are least."""

    def objective(x: Vector) -> Vector:
        return np.concatenate([errors(x * PRIORS), SCALE * PRIOR_WEIGHT * (x - 1.0) * PRIORS / SPREADS])

    bounds = ([c.low / c.prior for c in CONSTANTS], [c.high / c.prior for c in CONSTANTS])
    found = least_squares(
        objective, start / PRIORS, bounds=bounds, loss="soft_l1", f_scale=SCALE, diff_step=STEP, max_nfev=20
    )
    return found.x * PRIORS


def joint_fit(specs: Sequence[RunSpec], pricer: Pricer) -> Vector:
    """On all publishers, from the priors on."""
    return fit(lambda values: residuals(*log_ratios(specs, values, pricer)), PRIORS)


def training_rows(specs: Sequence[RunSpec]) -> list[RunSpec]:
    """At most ROWS of each publisher's rows on H100 or A100 that have a time and count."""
    by_suite: dict[str, list[RunSpec]] = defaultdict(list)
    for spec in specs:
        if spec.seconds is not None and not spec.weak and any(name in spec.gpu_text for name in ("H100", "A100")):
            by_suite[spec.suite].append(spec)
    chosen: list[RunSpec] = []
    for rows in by_suite.values():
        step = max(1.0, len(rows) / ROWS)
        chosen += [rows[int(i * step)] for i in range(min(ROWS, len(rows)))]
    return chosen


def held_out(rows: Sequence[RunSpec], joint: Vector, pricer: Pricer) -> dict[str, Vector]:
    """By publisher, the constants fitted without it.

    Log ratios are taken as linear in the constants around the joint fit, from one evaluation for each constant, so that
    a fit without a publisher takes no evaluations of its own; what is predicted with them is evaluated in full.
    """
    suites, base = log_ratios(rows, joint, pricer)
    steps = STEP * np.maximum(joint, 0.1 * PRIORS)
    slopes = np.stack([(log_ratios(rows, joint + step, pricer)[1] - base) / step.sum() for step in np.diag(steps)])
    names = np.array(suites)
    found = {}
    for suite in sorted(set(suites)):
        kept = names != suite

        def errors(values: Vector, kept: NDArray[np.bool_] = kept) -> Vector:
            return residuals(list(names[kept]), base[kept] + (values - joint) @ slopes[:, kept])

        found[suite] = fit(errors, joint)
        note(f"without {suite}: " + ", ".join(f"{v:.3g}" for v in found[suite]))
    return found


def held_out_transform() -> Transform:
    """Hardware with the constants that were fitted without the publisher of a run; of publishers that took no part in
    the fit, with those of the hardware files."""
    labels = json.loads(HELD_OUT.read_text())
    changes = {suite: transform([found[c.label] for c in CONSTANTS]) for suite, found in labels.items()}

    def change(spec: RunSpec, hardware: Hardware) -> Hardware:
        return changes[spec.suite](spec, hardware) if spec.suite in changes else hardware

    return change


def write(values: Sequence[float]) -> None:
    """Into the hardware files: each constant where it belongs."""
    named = {(c.name, c.machine): value for c, value in zip(CONSTANTS, values)}
    for machine in ("a100", *HOPPER, "b200"):
        path = YAML / f"{machine}.yaml"
        text = path.read_text()
        family = "a100" if machine == "a100" else "h100"
        text = _set(text, "sustained_fraction: ", f"{named['sustained_fraction', family]:.3f}")
        text = _set(text, "float8_gain: ", f"{named['float8_gain', 'h100']:.3g}")
        text = _set(text, "eager_traffic: ", f"{named['eager_traffic', '']:.3g}")
        text = _set(text, "eager_seconds: ", f"{named['eager_seconds', ''] * 1e-6:.3g}")
        text = _set(text, "host_seconds: ", f"{named['host_seconds', ''] * 1e-6:.3g}")
        text = _set(text, "contention_factor: ", f"{named['contention_factor', '']:.3g}")
        path.write_text(text)
        note(f"wrote {path.name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=HERE / "data" / "runs.csv", help="CSV file of published runs")
    parser.add_argument("--held-out", action="store_true", help="also fit without each publisher, and save those")
    parser.add_argument("--write", action="store_true", help="put the constants into the hardware files")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    specs, _ = specs_of(read_rows(options.runs))
    pricer = Pricer(progress=note)
    rows = training_rows(specs)
    values = joint_fit(rows, pricer)
    for constant, value in zip(CONSTANTS, values):
        unit = "" if constant.unit == "1" else f" {constant.unit}"
        print(f"{constant.label:26s} {value:8.3g}{unit:4s} {constant.meaning}")
    if options.held_out:
        labels = [c.label for c in CONSTANTS]
        without = held_out(rows, values, pricer)
        found = {suite: dict(zip(labels, x.round(5).tolist())) for suite, x in without.items()}
        HELD_OUT.write_text(json.dumps(found, indent=1) + "\n")
    if options.write:
        write(values)
    return 0


if __name__ == "__main__":
    sys.exit(main())
