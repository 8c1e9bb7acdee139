"""How many of the classes that plan also lower, and match the single process at tiny size on 4 simulated ranks.

Every class of coverage.py, its default configuration (mended where coverage.py mends it) shrunk by general rules, under
one plan with FSDP, data parallelism 2, sequence parallelism 2 and expert parallelism 2 where there are experts. Equal:
the loss and every gradient are what `omnicompile verify` calls equal. Writes benchmarks/results/lowering.json and .md,
as results come; each result states the commit that it was made with.

    python benchmarks/coverage.py --lower [--only NAME ... | --failed] [--resume] [--jobs 2]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import pkgutil
import resource
import subprocess
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import coverage
import mended_defaults

RESULTS = Path(__file__).parent / "results"
RANKS = 4
STRICT = 1e-5
# The code that results depend on.
_PROVED = ("../omnicompile/capture", "../omnicompile/anchors", "../omnicompile/lowering", "../passes")


@dataclass
class Lowered:
    """failed: "" if equal, else "tiny" (no tiny copy runs), "lower" (refused), "run", "differs", "timeout" or
    "process". seconds: of processor time. notes: what the proof said besides. commit: of the code that made it."""

    name: str
    group: str
    failed: str = ""
    reason: str = ""
    loss_error: float = 0.0
    worst_error: float = 0.0
    tolerance: float = 0.0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    commit: str = ""


def planned() -> list[tuple[str, str, bool]]:
    """(class, group, mended) of the classes that coverage.py plans."""
    found = json.loads((RESULTS / "coverage.json").read_text())
    return [(o["name"], o["group"], bool(o["mended"])) for o in found if not o["failed"]]


def _source(name: str, mended: bool) -> Any:
    from omnicompile.capture.source import ModelSource

    kind, config = coverage._class_to_plan(name)
    if mended:
        config = mended_defaults.mend(kind)[0]
    return ModelSource(name, name, lambda: coverage._build(kind, config), "")


def lower(name: str, group: str, mended: bool) -> Lowered:
    import torch

    from omnicompile.errors import OmniCompileError, VerificationError
    from omnicompile.lowering.proof import prove
    from omnicompile.lowering.proof_plan import default_plan
    from omnicompile.lowering.tiny import tiny_copy

    torch.set_num_threads(1)
    start = time.process_time()
    result = Lowered(name, group)
    stage = "tiny"
    try:
        tiny = tiny_copy(_source(name, mended))
        stage = "lower"
        report = prove(tiny, default_plan(tiny.model, tiny.batch(0), RANKS), name, check_values=False)
        result.loss_error, (worst, result.worst_error) = report.loss_error, report.worst
        result.tolerance, result.notes = report.tolerance, report.notes
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
    result.seconds = round(time.process_time() - start, 1)
    return result


def _child(name: str, group: str, mended: bool, limits: tuple[int, int], pipe: Connection) -> None:
    seconds, memory = limits
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        pipe.send(asdict(lower(name, group, mended)))


def run_all(
    todo: Sequence[tuple[str, str, bool]], jobs: int, limits: tuple[int, int], done: Callable[[Lowered], None]
) -> None:
    """Each class in a forked process of its own, `jobs` at a time. limits: seconds of processor time, bytes."""
    context = multiprocessing.get_context("fork")
    running: list[tuple[str, str, Any, Connection]] = []
    waiting = list(todo)
    finished = 0
    while waiting or running:
        while waiting and len(running) < jobs:
            name, group, mended = waiting.pop(0)
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(name, group, mended, limits, send))
            process.start()
            send.close()
            running.append((name, group, process, receive))
        time.sleep(0.05)
        for entry in list(running):
            result = _finished(*entry, limits=limits)
            if result is not None:
                running.remove(entry)
                done(result)
                finished += 1
                print(f"{finished}/{len(todo)} {result.name} {result.failed or 'equal'} {result.reason}", flush=True)


def _finished(name: str, group: str, process: Any, pipe: Connection, limits: tuple[int, int]) -> Lowered | None:
    if not pipe.poll():
        return None
    try:
        result = Lowered(**pipe.recv())
    except EOFError:
        process.join()
        if process.exitcode in (-9, -24):  # SIGKILL, SIGXCPU
            return Lowered(name, group, "timeout", f"took more than {limits[0]} s of processor time", seconds=limits[0])
        return Lowered(name, group, "process", f"ended with {process.exitcode}")
    process.join()
    return result


def _import_all() -> None:
    """What a proof needs, so that each forked process finds it imported: one state of the code."""
    import transformers  # noqa: F401

    import omnicompile.anchors
    import omnicompile.capture
    import omnicompile.lowering
    import omnicompile.passes

    for package in (omnicompile.anchors, omnicompile.capture, omnicompile.lowering, omnicompile.passes):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)


def _commit() -> str:
    """The commit of the working tree, marked where files that results depend on differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True).stdout

    changed = git("status", "--porcelain", "-uno", "--", *_PROVED, __file__, mended_defaults.__file__)
    return git("rev-parse", "--short", "HEAD").strip() + ("+" if changed.strip() else "")


def write(done: list[Lowered]) -> None:
    RESULTS.mkdir(exist_ok=True)
    done = sorted(done, key=lambda r: r.name)
    (RESULTS / "lowering.json").write_text(json.dumps([asdict(r) for r in done], indent=1) + "\n")
    (RESULTS / "lowering.md").write_text(report(done))


def report(done: list[Lowered]) -> str:
    equal = [r for r in done if not r.failed]
    rounded = [r.name for r in equal if r.tolerance > STRICT]
    total = len(planned())
    lines = [
        f"# Lowered and equal at tiny size on {RANKS} ranks: {len(equal)} of {total} classes that plan "
        f"({len(equal) / max(1, total):.0%})",
        "",
        f"{len(equal) - len(rounded)} within 1e-9 where the model computes in float64 and 1e-5 where it, or a part of "
        f"it, computes in float32; {len(rounded)} more with gradients as exact as float32 makes them, which change as "
        f"much in one process when the weights are rounded ({', '.join(rounded) or 'none'}).",
        "",
        f"{len(done)} tried, on average {sum(r.seconds for r in done) / max(1, len(done)):.0f} s of processor time. "
        "Made by `python benchmarks/coverage.py --lower` "
        f"at commits {', '.join(sorted({r.commit for r in done}))}; + marks uncommitted changes of files.",
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=None, help="class names")
    parser.add_argument("--failed", action="store_true", help="only classes that failed in the last run")
    parser.add_argument("--resume", action="store_true", help="only classes without a result of this commit")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=int, default=200, help="seconds of processor time per class")
    parser.add_argument("--memory", type=float, default=16.0, help="GiB of address space per class")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    _import_all()
    commit, todo = _commit(), planned()
    path = RESULTS / "lowering.json"
    known = {r["name"]: Lowered(**r) for r in json.loads(path.read_text())} if path.exists() else {}
    names = {name for name, _, _ in todo}
    results = {name: result for name, result in known.items() if name in names}

    def wanted(name: str) -> bool:
        last = known.get(name)
        if options.only is not None:
            return name in options.only
        if last is None:
            return True
        return bool(last.failed) if options.failed else last.commit != commit if options.resume else True

    def done(result: Lowered) -> None:
        result.commit = commit
        results[result.name] = result
        write(list(results.values()))

    wanted_classes = [entry for entry in todo if wanted(entry[0])]
    if len(wanted_classes) > options.jobs:
        lower(*todo[0])  # what a first proof imports is there when processes fork
    run_all(wanted_classes, options.jobs, (options.timeout, int(options.memory * 2**30)), done)
    print(report(list(results.values())))


if __name__ == "__main__":
    main()
