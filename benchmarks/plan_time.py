"""How long planning takes, in how much memory, and how that grows with depth and with GPUs.

Every measurement is a process of its own, so that imports count and nothing is warm. Measured:

- cold: `omnicompile plan examples/qwen2_vl_72b.py --gpus 128` with an empty cache, imports included;
- cached: the same with another --seq-len, and with another --gpus, after one run that filled the cache. Past the
  imports means: less a process that only imports, in the same order, every module that such a run imports;
- depth: cold, the same model with 28 and with 80 layers;
- gpus: 128 and 16,384 GPUs, the whole (cold) and the planning phase (`plan_program` on a captured model);
- llama: cold, Llama-3.1-8B on 128 GPUs, beside the published CPU-seconds of AutoParallel.

Wall times mean something on an idle machine only: the load is recorded, and so are CPU seconds (user and system, of the
process and its children). On a busy machine verdicts go by CPU seconds, and say so. What is compared with each other is
measured in turns, and compared within one run only.

    python benchmarks/plan_time.py [--repeats 5] [--only cold cached depth gpus llama] [--out DIRECTORY]

Writes plan_time.json and plan_time.md, prints the latter. Exit code 1 if a target is missed or a process failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MODEL, LLAMA, DEPTH = "examples/qwen2_vl_72b.py", "examples/llama_3_1_8b.py", "benchmarks/models/depth.py"
PARTS = ("cold", "cached", "depth", "gpus", "llama")
GPUS, MORE_GPUS, OTHER_GPUS, OTHER_SEQ_LEN = 128, 16384, 256, 16384
SHALLOW, DEEP = 28, 80
IDLE_LOAD = 0.5
TIMEOUT = 600
AUTOPARALLEL = {"1-D mesh": 59, "2-D mesh": 189}
"""CPU-seconds of AutoParallel for the same model and ranks on a machine of this class (mesh degrees given)."""


@dataclass(frozen=True)
class Run:
    """One process. rss: peak, MiB. load: the machine's load average before it started. error: "" if it succeeded."""

    wall: float
    cpu: float
    rss: float
    load: float
    error: str = ""
    output: str = field(default="", repr=False)


@dataclass
class Measurement:
    """Repeats of one command."""

    name: str
    command: list[str]
    runs: list[Run] = field(default_factory=list)

    @property
    def good(self) -> list[Run]:
        return [run for run in self.runs if not run.error]

    def wall(self) -> float:
        return statistics.median(run.wall for run in self.good) if self.good else float("nan")

    def cpu(self) -> float:
        return statistics.median(run.cpu for run in self.good) if self.good else float("nan")

    def rss(self) -> float:
        return max((run.rss for run in self.good), default=float("nan"))

    def phase(self, name: str) -> float:
        """Median of a figure that the process itself printed."""
        values = [json.loads(run.output)[name] for run in self.good]
        return statistics.median(values) if values else float("nan")


@dataclass(frozen=True)
class Verdict:
    """A figure against its target (at most). value: by wall time; cpu: by CPU seconds; None where there is none."""

    what: str
    value: float | None
    target: float
    unit: str
    cpu: float | None = None

    def passed(self, busy: bool) -> bool:
        judged = self.cpu if self.value is None or (busy and self.cpu is not None) else self.value
        return judged is not None and judged <= self.target  # False for nan: a failed measurement

    def word(self, busy: bool) -> str:
        by = " (by CPU)" if busy and self.value is not None and self.cpu is not None else ""
        return ("PASS" if self.passed(busy) else "FAIL") + by


class Bench:
    """Runs processes with caches of their own under `directory`."""

    def __init__(self, directory: Path, repeats: int, model: str = MODEL, llama: str = LLAMA) -> None:
        self.directory = directory
        self.repeats = repeats
        self.model, self.llama = model, llama
        self.measured: dict[str, Measurement] = {}
        self.verdicts: list[Verdict] = []

    def plan(self, name: str, *arguments: str, cache: Path | None = None) -> None:
        """One cold run of `omnicompile plan` (or one from `cache`), added to the measurement `name`."""
        self._add(name, [sys.executable, "-P", "-m", "omnicompile", "plan", *arguments], cache)

    def child(self, name: str, *arguments: str, cache: Path | None = None) -> None:
        """One run of this file as a child."""
        self._add(name, [sys.executable, "-P", str(Path(__file__).resolve()), *arguments], cache)

    def _add(self, name: str, command: list[str], cache: Path | None) -> None:
        entry = self.measured.setdefault(name, Measurement(name, [Path(command[0]).name, *command[1:]]))
        with tempfile.TemporaryDirectory(dir=self.directory) as empty:
            run = run_process(command, cache or Path(empty))
        entry.runs.append(run)
        status = f"failed: {run.error}" if run.error else f"{run.wall:.2f} s wall, {run.cpu:.2f} s CPU"
        print(f"{name}: {status}, {run.rss:,.0f} MiB, load {run.load:.1f}", file=sys.stderr, flush=True)

    @property
    def loads(self) -> list[float]:
        return [run.load for entry in self.measured.values() for run in entry.runs] or [0.0]

    @property
    def busy(self) -> bool:
        """Whether others were at work: our own processes make a load of about one, so a first of more than that."""
        return max(self.loads) > 1.0 + IDLE_LOAD * (os.cpu_count() or 1)

    def cold(self) -> None:
        for _ in range(self.repeats):
            self.plan("cold", self.model, "--gpus", str(GPUS))
        cold = self.measured["cold"]
        what = f"cold plan for {GPUS} GPUs, imports included"
        self.verdicts.append(Verdict(what, cold.wall(), 10.0, "s", cold.cpu()))
        self.verdicts.append(Verdict("its peak memory", cold.rss(), 2048.0, "MiB"))

    def cached(self) -> None:
        with tempfile.TemporaryDirectory(dir=self.directory) as directory:
            cache, modules = Path(directory), Path(directory) / "modules.json"
            self.plan("fill the cache", self.model, "--gpus", str(GPUS), cache=cache)
            asked = {
                f"cached, --seq-len {OTHER_SEQ_LEN}": ("--gpus", str(GPUS), "--seq-len", str(OTHER_SEQ_LEN)),
                f"cached, --gpus {OTHER_GPUS}": ("--gpus", str(OTHER_GPUS)),
            }
            self.child("list modules", "--list-modules", str(modules), self.model, "--gpus", str(GPUS), cache=cache)
            for _ in range(self.repeats):
                self.child("imports", "--import-modules", str(modules), cache=cache)
                for name, arguments in asked.items():
                    self.plan(name, self.model, *arguments, cache=cache)
        imports = self.measured["imports"]
        for name in asked:
            entry = self.measured[name]
            past, cpu = entry.wall() - imports.wall(), entry.cpu() - imports.cpu()
            self.verdicts.append(Verdict(f"{name}, past the imports", past, 1.0, "s", cpu))

    def depth(self) -> None:
        for _ in range(self.repeats):
            for layers in (SHALLOW, DEEP):
                self.plan(f"cold, {layers} layers", f"{ROOT / DEPTH}:layers_{layers}", "--gpus", str(GPUS))
        self._ratio(f"{SHALLOW} -> {DEEP} layers", f"cold, {DEEP} layers", f"cold, {SHALLOW} layers", 1.2)

    def gpus(self) -> None:
        with tempfile.TemporaryDirectory(dir=self.directory) as directory:
            cache = Path(directory)
            self.plan("fill the cache", self.model, "--gpus", str(GPUS), cache=cache)
            for _ in range(self.repeats):
                for gpus in (GPUS, MORE_GPUS):
                    self.plan(f"cold, {gpus} GPUs", self.model, "--gpus", str(gpus))
                    self.child(f"planning phase, {gpus} GPUs", "--phase", self.model, str(gpus), cache=cache)
        title = f"{GPUS} -> {MORE_GPUS} GPUs"
        self._ratio(f"{title}, whole", f"cold, {MORE_GPUS} GPUs", f"cold, {GPUS} GPUs", 1.5)
        more, fewer = (self.measured[f"planning phase, {gpus} GPUs"] for gpus in (MORE_GPUS, GPUS))
        wall, cpu = (more.phase(key) / fewer.phase(key) for key in ("wall", "cpu"))
        self.verdicts.append(Verdict(f"growth, {title}, planning phase", wall, 1.5, "x", cpu))

    def llama_cpu(self) -> None:
        for _ in range(self.repeats):
            self.plan("cold, Llama-3.1-8B", self.llama, "--gpus", str(GPUS))
        cpu = self.measured["cold, Llama-3.1-8B"].cpu()
        target = float(min(AUTOPARALLEL.values()))
        what = f"Llama-3.1-8B, {GPUS} GPUs, against AutoParallel's better figure"
        self.verdicts.append(Verdict(what, None, target, "s", cpu))

    def _ratio(self, what: str, more: str, less: str, target: float) -> None:
        a, b = self.measured[more], self.measured[less]
        self.verdicts.append(Verdict(f"growth, {what}", a.wall() / b.wall(), target, "x", a.cpu() / b.cpu()))


def run_process(command: list[str], cache: Path) -> Run:
    """Run `command` with its captures cached in `cache` and only there."""
    environment = os.environ | {"OMNICOMPILE_CACHE": str(cache)}
    load = os.getloadavg()[0]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=err, cwd=ROOT, env=environment)
        deadline = started + TIMEOUT
        status, usage = 0, None
        while usage is None:
            pid, status, found = os.wait4(process.pid, os.WNOHANG)
            if pid:
                usage = found
            elif time.perf_counter() > deadline:
                process.kill()
                _, status, usage = os.wait4(process.pid, 0)
            else:
                time.sleep(0.002)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        text, message = out.read().decode(errors="replace"), err.read().decode(errors="replace").strip()
    error = "" if process.returncode == 0 else f"exit code {process.returncode}: {message.splitlines()[-1:]}"
    cpu = usage.ru_utime + usage.ru_stime
    return Run(round(wall, 3), round(cpu, 3), round(usage.ru_maxrss / 1024, 1), round(load, 2), error, text)


def list_modules(file: Path, arguments: list[str]) -> int:
    """Run `omnicompile plan` in this process and write the names of the modules that were imported, in order."""
    from omnicompile.cli.main import main as command

    code = command(["plan", *arguments])
    specs = {name: getattr(module, "__spec__", None) for name, module in list(sys.modules.items())}
    names = [name for name, spec in specs.items() if spec is not None and not name.startswith("omnicompile_user_")]
    file.write_text(json.dumps(names))
    return code


def planning_phase(model: str, gpus: int) -> int:
    """Print the wall and CPU seconds of planning alone, for a model whose capture is in the cache."""
    from omnicompile.capture.api import capture_program
    from omnicompile.capture.source import load_model_source
    from omnicompile.cluster import Cluster
    from omnicompile.planner.api import plan_program
    from omnicompile.workload import Workload

    source = load_model_source(model)
    workload = source.workload or Workload()
    program = capture_program(source, workload)
    wall, cpu = time.perf_counter(), time.process_time()
    plan_program(program, Cluster(gpus), workload, top=4)
    print(json.dumps({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}))
    return 0


def import_modules(file: Path) -> int:
    for name in json.loads(file.read_text()):
        try:
            importlib.import_module(name)
        except Exception as error:  # some modules only exist once others have run
            print(f"{name}: {error}", file=sys.stderr)
    return 0


def report(bench: Bench, parts: list[str], environment: dict[str, str]) -> str:
    lines = ["# Planning time", "", "Printed by `python benchmarks/plan_time.py`, which says what is measured how.", ""]
    lines += [f"- {key}: {value}" for key, value in environment.items()]
    lines += [f"- load average before the runs: {min(bench.loads):.1f} to {max(bench.loads):.1f}", ""]
    if bench.busy:
        warning = "The machine was busy: wall times mean little, CPU seconds are inflated, verdicts go by those."
        lines += [f"**{warning}**", ""]
    lines += ["| | by wall time | by CPU seconds | at most | |", "|---|---|---|---|---|"]
    for verdict in bench.verdicts:
        figures = ["" if x is None else f"{x:,.2f} {verdict.unit}" for x in (verdict.value, verdict.cpu)]
        target = f"{verdict.target:,.6g} {verdict.unit}"
        lines.append(f"| {verdict.what} | {' | '.join(figures)} | {target} | {verdict.word(bench.busy)} |")
    lines += ["", "| process | runs | wall s: median (all) | CPU s: median (all) | peak MiB |", "|---|---|---|---|---|"]
    for entry in bench.measured.values():
        wall, cpu = (", ".join(f"{getattr(run, key):.2f}" for run in entry.good) for key in ("wall", "cpu"))
        lines.append(
            f"| {entry.name} | {len(entry.good)} | {entry.wall():.2f} ({wall}) | {entry.cpu():.2f} ({cpu}) "
            f"| {entry.rss():,.0f} |"
        )
        lines += [f"| {entry.name}: **failed** | | {run.error} | | |" for run in entry.runs if run.error]
    if "llama" in parts:
        published = ", ".join(f"{seconds} ({mesh})" for mesh, seconds in AUTOPARALLEL.items())
        lines += ["", f"AutoParallel, Llama-3.1-8B on 128 ranks, mesh given, same class of machine: {published} CPU-s."]
    return "\n".join(lines) + "\n"


def environment_facts() -> dict[str, str]:
    names = ("omnicompile", "torch", "transformers", "numpy", "scipy", "sympy")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _git("rev-parse", "--short", "HEAD") + (" with changes" if _git("status", "--porcelain") else ""),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {_memory_gib():.0f} GiB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "packages": ", ".join(f"{name} {version(name)}" for name in names),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
    }


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown" if arguments[0] == "rev-parse" else ""
    return result.stdout.strip()


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", default=MODEL, help="another model for cold, cached and gpus")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    facts = environment_facts()
    with tempfile.TemporaryDirectory(prefix="plan_time_") as directory:
        bench = Bench(Path(directory), args.repeats, args.model)
        steps = {
            "cold": bench.cold, "cached": bench.cached, "depth": bench.depth, "gpus": bench.gpus,
            "llama": bench.llama_cpu,
        }  # fmt: skip
        for part in args.only:
            steps[part]()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = {name: [asdict(replace(run, output="")) for run in entry.runs] for name, entry in bench.measured.items()}
    measured = {
        name: {"command": [part.removeprefix(f"{ROOT}/") for part in entry.command], "runs": runs[name]}
        for name, entry in bench.measured.items()
    }
    verdicts = [asdict(verdict) | {"verdict": verdict.word(bench.busy)} for verdict in bench.verdicts]
    data = {"environment": facts, "verdicts": verdicts, "measured": measured, "autoparallel_cpu_seconds": AUTOPARALLEL}
    (args.out / "plan_time.json").write_text(json.dumps(data, indent=1) + "\n")
    text = report(bench, args.only, facts)
    (args.out / "plan_time.md").write_text(text)
    print(text)
    failed = any(run.error for entry in bench.measured.values() for run in entry.runs)
    return 0 if all(verdict.passed(bench.busy) for verdict in bench.verdicts) and not failed else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--list-modules"]:
        sys.exit(list_modules(Path(sys.argv[2]), sys.argv[3:]))
    if sys.argv[1:2] == ["--phase"]:
        sys.exit(planning_phase(sys.argv[2], int(sys.argv[3])))
    if sys.argv[1:2] == ["--import-modules"]:
        sys.exit(import_modules(Path(sys.argv[2])))
    sys.exit(main())
