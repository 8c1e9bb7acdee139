"""How many of the classes that plan also lower, and match the single process at tiny size on 4 simulated ranks.

Every class of coverage.py, its default configuration (mended where coverage.py mends it) shrunk by general rules, under
one plan with FSDP, data parallelism 2, sequence parallelism 2 and expert parallelism 2 where there are experts. Equal:
the loss and every gradient are what `omnicompile verify` calls equal. Writes benchmarks/results/lowering.json and .md,
as results come.

    python benchmarks/lowering_coverage.py [--only NAME ...] [--jobs 1] [--timeout 150] [--resume]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import coverage

RESULTS = Path(__file__).parent / "results"
RANKS = 4


@dataclass
class Lowered:
    """failed: "" if equal, else "tiny" (no tiny copy runs), "lower" (refused), "run", "differs" or "timeout"."""

    name: str
    group: str
    failed: str = ""
    reason: str = ""
    loss_error: float = 0.0
    worst_error: float = 0.0
    tolerance: float = 0.0
    seconds: float = 0.0


def planned() -> list[tuple[str, str, bool]]:
    """(class, group, mended) of the classes that coverage.py plans."""
    found = json.loads((RESULTS / "coverage.json").read_text())
    return [(o["name"], o["group"], bool(o["mended"])) for o in found if not o["failed"]]


def lower(name: str, group: str, mended: bool) -> Lowered:
    import torch

    from omnicompile.capture.source import ModelSource
    from omnicompile.errors import OmniCompileError, VerificationError
    from omnicompile.lowering.proof import prove
    from omnicompile.lowering.proof_plan import default_plan
    from omnicompile.lowering.tiny import tiny_copy

    torch.set_num_threads(1)
    start = time.perf_counter()
    result = Lowered(name, group)
    stage = "tiny"
    try:
        config = coverage.mend(name)[0] if mended else None
        tiny = tiny_copy(ModelSource(name, name, lambda: coverage._build(name, config), ""))
        stage = "lower"
        report = prove(tiny, default_plan(tiny.model, tiny.batch(0), RANKS), name, check_values=False)
        result.loss_error, (worst, result.worst_error) = report.loss_error, report.worst
        result.tolerance = report.tolerance
        if not report.equal:
            result.failed = "differs"
            result.reason = report.verdict or f"{worst} off by {result.worst_error:.1e}"
    except VerificationError as error:
        result.failed, result.reason = "run", str(error)
    except OmniCompileError as error:
        result.failed, result.reason = stage, str(error)
    except Exception as error:  # every reason is a result
        result.failed, result.reason = stage, f"{type(error).__name__}: {error}"
    result.reason = " ".join(result.reason.split())[:300]
    result.seconds = round(time.perf_counter() - start, 1)
    return result


def _child(name: str, group: str, mended: bool, pipe: Connection) -> None:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        pipe.send(asdict(lower(name, group, mended)))


def run_all(todo: list[tuple[str, str, bool]], done: list[Lowered], jobs: int, timeout: float) -> None:
    """Each class in a process of its own, `jobs` at a time; results are appended to `done` and written."""
    context = multiprocessing.get_context("fork")
    running: list[tuple[str, str, Any, Connection, float]] = []
    waiting = list(todo)
    while waiting or running:
        while waiting and len(running) < jobs:
            name, group, mended = waiting.pop(0)
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(name, group, mended, send))
            process.start()
            send.close()
            running.append((name, group, process, receive, time.monotonic()))
        time.sleep(0.1)
        for entry in list(running):
            result = _finished(*entry, timeout=timeout)
            if result is not None:
                running.remove(entry)
                done.append(result)
                print(f"{len(done)} {result.name} {result.failed or 'equal'} {result.reason}", flush=True)
                write(done)


def _finished(name: str, group: str, process: Any, pipe: Connection, start: float, timeout: float) -> Lowered | None:
    if pipe.poll():
        try:
            result = Lowered(**pipe.recv())
        except EOFError:
            result = Lowered(name, group, "process", "ended without a result")
        process.join()
        return result
    if time.monotonic() - start > timeout:
        process.kill()
        process.join()
        return Lowered(name, group, "timeout", f"took more than {timeout:.0f} s")
    return None


def write(done: list[Lowered]) -> None:
    RESULTS.mkdir(exist_ok=True)
    done = sorted(done, key=lambda r: r.name)
    (RESULTS / "lowering.json").write_text(json.dumps([asdict(r) for r in done], indent=1) + "\n")
    (RESULTS / "lowering.md").write_text(report(done))


def report(done: list[Lowered]) -> str:
    equal = [r for r in done if not r.failed]
    total = len(planned())
    lines = [
        f"# Lowered and equal at tiny size on {RANKS} ranks: {len(equal)} of {len(done)} classes tried "
        f"({len(equal) / max(1, len(done)):.0%}); {total} plan",
        "",
        "| failed at | classes |",
        "|---|---|",
        *(f"| {kind or 'equal'} | {count} |" for kind, count in Counter(r.failed for r in done).most_common()),
        "",
        "| class | failed at | reason |",
        "|---|---|---|",
        *(f"| {r.name} | {r.failed} | {r.reason.replace('|', '/')} |" for r in done if r.failed),
        "",
        "| class | loss off by | worst gradient off by | tolerance |",
        "|---|---|---|---|",
        *(f"| {r.name} | {r.loss_error:.1e} | {r.worst_error:.1e} | {r.tolerance:.0e} |" for r in equal),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=None, help="class names")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=150.0, help="seconds per class")
    parser.add_argument("--resume", action="store_true", help="keep the results that are there")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    import torch  # noqa: F401  (once, before the forks)
    import transformers  # noqa: F401

    done: list[Lowered] = []
    if options.resume or options.only is not None:
        found = RESULTS / "lowering.json"
        done = [Lowered(**r) for r in json.loads(found.read_text())] if found.exists() else []
    if options.only is not None:
        done = [r for r in done if r.name not in options.only]
    kept = {r.name for r in done}
    todo = [p for p in planned() if p[0] not in kept and (options.only is None or p[0] in options.only)]
    run_all(todo, done, options.jobs, options.timeout)
    print(report(done))


if __name__ == "__main__":
    main()
