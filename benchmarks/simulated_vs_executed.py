"""Predicted step time and peak memory beside executed plans, on the machine at hand.

The machine is calibrated first, as `omnicompile calibrate` does it: kernels and collectives alone, no plan. Then plans
are executed through `omnicompile.parallelize`, with the backend whose graph the planner prices ("inductor"), and
predicted by `planner.predict.simulate` on the calibrated file, in the plans' dtypes.

On CPUs: two gloo processes of one thread each, float32. On a GPU: one process, bfloat16. All plans live in the same
processes and take steps in turns, the order rotated each time; the time of a step is the slowest rank's, of a step
forward, backward and a fused AdamW. Printed are the median and quartiles over the repeats.

Peak memory of a rank: what it keeps between steps (parameters, buffers, optimizer states) and the most that a step
holds beyond that, by the profiler's record of every allocation, on GPUs by torch.cuda.max_memory_allocated; the
highest rank's, median of five steps. Predicted
is the sum of all kinds without context and allocator slack.

    python benchmarks/simulated_vs_executed.py  # everything; writes results/simulated_vs_executed.*
    python benchmarks/simulated_vs_executed.py --hardware my.yaml --cases "dense fsdp" "dense sp2" --json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plan_time import environment_facts

if TYPE_CHECKING:
    from executed_plans import Case, Predicted

HERE = Path(__file__).resolve().parent
MIB = 2**20
TIME_GOAL, MEMORY_GOAL = 0.20, 0.05
SAME = 0.02
"""Measured times that differ by less are not ranked."""


@dataclass(frozen=True)
class Row:
    """One plan. measured, low, high: seconds of a step, median and quartiles. Errors: predicted over measured, less
    one. cpu: median CPU seconds of a step and rank. peaks: the lowest and the highest of the steps measured."""

    name: str
    family: str
    tokens: int
    measured: float
    low: float
    high: float
    cpu: float
    predicted: float
    measured_peak: float
    predicted_peak: float
    peaks: tuple[float, float] = (0.0, 0.0)

    @property
    def time_error(self) -> float:
        return self.predicted / self.measured - 1.0

    @property
    def memory_error(self) -> float:
        return self.predicted_peak / self.measured_peak - 1.0


def make_row(name: str, family: str, tokens: int, executed: dict[str, Any], step: float, peak: float) -> Row:
    """executed: the fields of `executed_plans.Executed`. step, peak: predicted."""
    low, median, high = statistics.quantiles(executed["step"], n=4, method="inclusive")
    cpu = statistics.median(executed["cpu"])
    peaks = (float(min(executed["peaks"])), float(max(executed["peaks"])))
    return Row(name, family, tokens, median, low, high, cpu, step, float(executed["peak"]), peak, peaks)


def ordered_pairs(rows: list[Row]) -> tuple[int, int]:
    """(pairs of plans of one family that are predicted in the order in which they were measured, by tokens/s; pairs)"""
    right = total = 0
    for a, b in itertools.combinations(rows, 2):
        measured = (a.tokens / a.measured) / (b.tokens / b.measured)
        if a.family != b.family or abs(measured - 1.0) < SAME:
            continue
        total += 1
        right += (measured > 1.0) == ((a.tokens / a.predicted) > (b.tokens / b.predicted))
    return right, total


def _sign(error: float) -> str:
    return f"{error:+.1%}"


def report(
    rows: list[Row], facts: dict[str, str], details: dict[str, dict[str, Any]], fit: list[dict[str, Any]]
) -> str:
    """Markdown. details: by plan, predicted and measured seconds by kind of operator. fit: errors of calibration."""
    lines = ["# Simulated beside executed", ""]
    lines += ["Printed by `python benchmarks/simulated_vs_executed.py`, which says what is measured how.", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    lines += ["", "## Step time", ""]
    lines += ["| plan | measured ms (quartiles) | predicted ms | error | CPU ms |", "|---|---|---|---|---|"]
    for row in rows:
        spread = f"{row.measured * 1e3:.1f} ({row.low * 1e3:.1f}-{row.high * 1e3:.1f})"
        cells = (row.name, spread, f"{row.predicted * 1e3:.1f}", _sign(row.time_error), f"{row.cpu * 1e3:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *verdict(rows), "", "## Peak memory", ""]
    lines += ["| plan | measured MiB (lowest, highest) | predicted MiB | error |", "|---|---|---|---|"]
    for row in rows:
        spread = f"{row.measured_peak / MIB:.1f} ({row.peaks[0] / MIB:.1f}-{row.peaks[1] / MIB:.1f})"
        sizes = (spread, f"{row.predicted_peak / MIB:.1f}")
        lines.append(f"| {row.name} | {' | '.join(sizes)} | {_sign(row.memory_error)} |")
    lines += [
        "",
        "## Operators",
        "",
        "Seconds of a step's operators, predicted and (profiled, rank 0) measured, in ms.",
    ]
    lines += ["What is computed again counts as measured only.", ""]
    kinds = ("gemm", "attention", "grouped_gemm")
    lines += [f"| plan | {' | '.join(f'{kind}: predicted | measured' for kind in kinds)} |", "|---" * 7 + "|"]
    for name, found in details.items():
        pairs = [f"{1e3 * found[side].get(kind, 0.0):.1f}" for kind in kinds for side in ("predicted", "measured")]
        lines.append(f"| {name} | {' | '.join(pairs)} |")
    lines += ["", "## Calibration", "", "Time by the fitted formulas against measured time of single operations.", ""]
    lines += ["| group | | shapes | median | 90th percentile | bias |", "|---|---|---|---|---|---|"]
    for found in fit:
        errors = (f"{found['median']:.1%}", f"{found['p90']:.1%}", _sign(found["bias"]))
        lines.append(f"| {found['group']} | {found['source']} | {found['points']} | {' | '.join(errors)} |")
    return "\n".join(lines) + "\n"


def verdict(rows: list[Row]) -> list[str]:
    """What of the goals is reached."""
    times = sum(abs(row.time_error) <= TIME_GOAL for row in rows)
    peaks = sum(abs(row.memory_error) <= MEMORY_GOAL for row in rows)
    right, total = ordered_pairs(rows)
    return [
        f"- {times} of {len(rows)} predicted within {TIME_GOAL:.0%} of the measured step time",
        f"- {peaks} of {len(rows)} predicted within {MEMORY_GOAL:.0%} of the measured peak memory",
        f"- {right} of {total} pairs of plans for the same model in the right order (by tokens/s, from {SAME:.0%} on)",
    ]


def calibrated(given: Path | None, ranks: int, quick: bool, folder: str) -> tuple[str, list[dict[str, Any]]]:
    """(path of the hardware file, errors of its fit); measured now unless a file is given."""
    if given is not None:
        return str(given), []
    from omnicompile.calibration.processes import calibrate
    from omnicompile.cost_model.calibration_fit import fit_hardware
    from omnicompile.cost_model.hardware_text import hardware_text
    from omnicompile.whole_file import write_whole

    measured = calibrate(ranks, quick, "", quiet=False)
    assert measured is not None
    fit = fit_hardware(measured)
    path = Path(folder) / "calibrated.yaml"
    write_whole(path, hardware_text(fit.hardware))
    return str(path), [{"group": name} | asdict(errors) for name, found in fit.groups for errors in found]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(names: list[str], ranks: int, repeats: int, backend: str, folder: str) -> dict[str, dict[str, Any]]:
    """What rank 0 of `ranks` fresh processes measured, by case."""
    import torch.multiprocessing as mp
    from executed_plans import run_rank

    mp.spawn(run_rank, (ranks, _free_port(), names, repeats, backend, folder), nprocs=ranks)
    found: dict[str, dict[str, Any]] = json.loads((Path(folder) / "executed.json").read_text())
    return found


def _rows(cases: dict[str, Case], executed: dict[str, Any], predicted: dict[str, Predicted]) -> list[Row]:
    return [
        make_row(name, cases[name].family, cases[name].tokens, found, predicted[name].step, predicted[name].peak)
        for name, found in executed.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", help="names of plans (default: all)")
    parser.add_argument("--hardware", type=Path, help="a calibrated hardware file (default: calibrate now)")
    parser.add_argument("--quick", action="store_true", help="a quick calibration")
    parser.add_argument("--repeats", type=int, default=11, help="timed steps of each (default 11, at least 7)")
    parser.add_argument("--backend", choices=("inductor", "step"), default="inductor")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of the report")
    parser.add_argument("--out", type=Path, help="where the results go (default: benchmarks/results, if all was run)")
    args = parser.parse_args()
    import torch
    from executed_plans import Predictor, cases

    gpu = torch.cuda.is_available()
    known = cases(gpu)
    names = args.cases or list(known)
    if args.repeats < 7:
        parser.error("--repeats: at least 7, or medians and quartiles mean nothing")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--cases: no plan {unknown[0]!r}; there are {', '.join(known)}")
    ranks = 1 if gpu else 2
    started = time.perf_counter()
    facts = environment_facts() | {"load before": f"{os.getloadavg()[0]:.1f}"}
    with tempfile.TemporaryDirectory() as folder:
        hardware, fit = calibrated(args.hardware, ranks, args.quick, folder)
        facts["calibration"] = "quick" if args.quick else "full" if args.hardware is None else str(args.hardware)
        predict = Predictor(hardware, "bfloat16" if gpu else "float32")
        predicted = {name: predict(known[name]) for name in names}
        executed = run(names, ranks, args.repeats, args.backend, folder)
        text_of_hardware = Path(hardware).read_text()
    device = f"{torch.cuda.get_device_name()}, bfloat16" if gpu else f"{ranks} gloo processes of one thread, float32"
    facts |= {"processes": device, "backend": args.backend, "repeats": str(args.repeats)}
    facts["duration"] = f"{time.perf_counter() - started:.0f} s"
    rows = _rows(known, executed, predicted)
    details = {n: {"predicted": predicted[n].compute, "measured": executed[n]["compute"]} for n in names}
    text = report(rows, facts, details, fit)
    data = {
        "environment": facts,
        "rows": [asdict(row) | {"time_error": row.time_error, "memory_error": row.memory_error} for row in rows],
        "predicted": {name: asdict(found) for name, found in predicted.items()},
        "executed": executed,
        "calibration": fit,
        "hardware": text_of_hardware,
    }
    print(json.dumps(data) if args.json else text)
    out = args.out or (HERE / "results" if args.cases is None and args.hardware is None else None)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "simulated_vs_executed.json").write_text(json.dumps(data, indent=1) + "\n")
        (out / "simulated_vs_executed.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
