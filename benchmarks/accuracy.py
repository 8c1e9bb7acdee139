"""How well the cost model predicts published training runs: step time, peak memory, and which layout is best.

Takes a CSV file with the columns of `benchmarks/data/runs.csv`, predicts every row that says enough, and reports errors
by publisher, kind of parallelism and GPU, and why the other rows are not predicted. Nothing is looked up by the id of a
row; what a row leaves open follows general rules, listed where they are applied:

- published_rows.py: columns and their numbers
- published_models.py: model sizes to a Hugging Face configuration
- published_machines.py: GPU and network to a hardware file with changes
- published_layouts.py: degrees, sharding, recompute, dtypes, overlap; what a framework implies
- published_specs.py: measured time and memory, and which rows do not count in totals

Compared are step times, never printed MFU, as every publisher counts FLOPs in another way; an MFU is turned into a time
only where the notes define its FLOPs. Memory is compared as allocated or reserved bytes, as the row says.

    python benchmarks/accuracy.py --runs FILE.csv [--json] [--out results.md] [--suite NAME ...] [--rows ID,ID]
    python benchmarks/accuracy.py --runs FILE.csv --explain ID
    python benchmarks/accuracy.py --runs FILE.csv --held-out

Without --held-out the constants are those of the hardware files, which were fitted on rows of runs.csv
(`calibrate_runs.py`). With it, every publisher is predicted with constants that were fitted without its rows.

No GPU is needed. A first run captures each model once (about a minute); later ones take seconds. Exit code 2: a file or
column that cannot be used.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calibrate_runs import held_out_transform
from published_report import data, explain, markdown
from published_rows import Row, read_rows
from published_runs import Pricer, evaluate, note
from published_specs import specs_of

from omnicompile.errors import InputError, OmniCompileError

FITTED_WORDS = (
    "The constants are those of the hardware files, fitted on these rows among others; `--held-out` predicts every "
    "publisher with constants that were fitted without it."
)
HELD_OUT_WORDS = "Every publisher is predicted with constants that were fitted without its rows."


def main(arguments: Sequence[str] | None = None) -> int:
    options = _arguments(arguments)
    warnings.filterwarnings("ignore")
    try:
        return _run(options)
    except OmniCompileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", required=True, type=Path, help="CSV file of published runs")
    parser.add_argument("--json", action="store_true", help="print every row and all errors as JSON")
    parser.add_argument("--out", type=Path, help="also write the report, as Markdown")
    parser.add_argument("--suite", nargs="+", default=[], help="only rows of these publishers (MPT of MPT-115)")
    parser.add_argument("--rows", type=lambda text: text.split(","), default=[], help="only these ids, comma-separated")
    parser.add_argument(
        "--held-out", action="store_true", help="constants fitted without the publisher that is predicted"
    )
    parser.add_argument("--explain", metavar="ID", help="print the parts of one row's prediction")
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> int:
    rows = read_rows(options.runs)
    specs, skipped = specs_of(rows)
    wanted = {row.id for row in _chosen(rows, options)}
    specs = [s for s in specs if s.id in wanted]
    skipped = [s for s in skipped if s.id in wanted]
    started = time.perf_counter()
    outcomes = evaluate(specs, held_out_transform() if options.held_out else None, Pricer(progress=note))
    note(f"{len(outcomes)} rows priced in {time.perf_counter() - started:.1f} s")
    if options.explain:
        print("\n".join([explain(o) for o in outcomes] or [f"{s.id}  skipped: {s.reason}" for s in skipped]))
        return 0
    command = f"python benchmarks/accuracy.py --runs {options.runs}" + (" --held-out" if options.held_out else "")
    text = markdown(outcomes, skipped, command, HELD_OUT_WORDS if options.held_out else FITTED_WORDS)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    print(json_text(data(outcomes, skipped)) if options.json else text)
    return 0


def _chosen(rows: Sequence[Row], options: argparse.Namespace) -> list[Row]:
    """The rows that the options name. Raises InputError for a name that no row has."""
    ids = [options.explain] if options.explain else options.rows
    for name in ids:
        if not any(row.id == name for row in rows):
            raise InputError(f"{options.runs}: no row {name}")
    for name in options.suite:
        if not any(row.suite == name for row in rows):
            known = ", ".join(sorted({row.suite for row in rows}))
            raise InputError(f"{options.runs}: no rows of {name}; there are {known}")
    return [r for r in rows if (not ids or r.id in ids) and (not options.suite or r.suite in options.suite)]


def json_text(value: Any) -> str:
    """JSON with five significant digits and a line per row."""
    return json.dumps(_rounded(value)).replace(', {"', ',\n{"')


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
