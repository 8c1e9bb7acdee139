"""How many Hugging Face classes are captured and planned, at their default configuration and unmodified.

Goes over every class of transformers' multimodal-LM and image-text-to-text mappings and every causal LM whose default
configuration has experts. Stages: build (on the meta device), inputs, forward (fake, to a scalar loss), capture, plan.
Some default configurations cannot run in any framework: a vision tower wider than the text that it feeds, no layer
types. A class that fails as it is, is tried again with such fields mended by general rules, and counted apart
(mended_defaults.py). A class without a forward of its own is planned by its first part that has one, and counted so.
Why a class is not planned as it is, is told apart by tests and not by opinion: transformers itself cannot build it; or
the same code plans it once fields are mended; anything else is this project's.
Prints how many succeed, with the reason for each that does not; writes benchmarks/results/coverage.json and .md.

    python benchmarks/coverage.py [--until forward|capture|plan] [--only NAME ... | --failed] [--jobs 2]
    python benchmarks/coverage.py --lower [options of lowering_coverage.py]

Results are written as they come; a run of some classes (`--only`, `--failed`, `--stale`) replaces the results of those
alone. Each result states the commit that it was made with.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import mended_defaults

STAGES = ("build", "inputs", "forward", "capture", "plan")
RESULTS = Path(__file__).parent / "results"
SEQ_LEN, IMAGE_PIXELS, AUDIO_SECONDS = 4096, 448, 10.0
GPUS = (128, 512, 2048)  # models of a trillion parameters do not fit on the first
# The code that results depend on.
_PRICED = ("../omnicompile/capture", "../omnicompile/anchors", "../omnicompile/planner", "../cost_model")
EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")


@dataclass
class Outcome:
    """What became of one class. failed: the stage that failed, "" if all went well. seconds: per stage that ran.
    mended: fields of the default configuration that were changed, and reason_as_is: why it failed without. commit:
    the code that it was made with. until: the last stage that was asked for. gpus: the number
    of H100 that it was planned on. build_error: why transformers cannot build the class at its default configuration,
    "" if it can. part: the class that was planned in its place. notes: what the capture itself filled in."""

    name: str
    group: str
    failed: str = ""
    reason: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    mended: list[str] = field(default_factory=list)
    reason_as_is: str = ""
    commit: str = ""
    until: str = ""
    gpus: int = 0
    build_error: str = ""
    part: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def cause(self) -> str:
        """Why the class is not planned at its default configuration as it is; "" if it is."""
        if not self.failed and not self.mended:
            return ""
        if self.build_error:
            needed = self.build_error.startswith("ImportError")
            return "needs a package that is not installed" if needed else "transformers cannot build it"
        return "its fields contradict each other" if not self.failed else "this project"


def classes() -> list[tuple[str, str]]:
    """(class name, group) of all classes to cover."""
    from transformers.models.auto import modeling_auto as auto

    found: dict[str, str] = {}
    for group, mapping in (
        ("multimodal-lm", auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES),
        ("image-text-to-text", auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    ):
        for value in mapping.values():
            for name in value if isinstance(value, tuple | list) else [value]:
                found.setdefault(name, group)
    for name in dict.fromkeys(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        if name not in found and _has_experts(name):
            found[name] = "moe-causal-lm"
    return list(found.items())


def _has_experts(name: str) -> bool:
    import transformers

    try:
        config = getattr(transformers, name).config_class()
        text = config.get_text_config()
    except Exception:  # a class that cannot be looked at is no mixture of experts that we know of
        return False
    return any(isinstance(n := getattr(text, f, None), int) and n > 1 for f in EXPERT_FIELDS)


def _request(model: Any) -> Any:
    from omnicompile.capture.inputs import InputRequest, input_constraints

    limits = input_constraints(model)
    images, audio = limits.images, limits.audio
    return InputRequest(
        seq_len=min(SEQ_LEN, limits.max_seq_len or SEQ_LEN),
        images=2 if images else 0,
        image_grid=images.nearest_grid(IMAGE_PIXELS, IMAGE_PIXELS) if images else None,
        clips=2 if audio else 0,
        audio_frames=audio.nearest_frames(AUDIO_SECONDS) if audio else None,
    )


def _class_to_plan(name: str) -> tuple[Any, Any]:
    """The class and its default configuration, or those of its part that has a forward."""
    import transformers

    from omnicompile.capture.config_source import with_forward

    kind = getattr(transformers, name)
    return with_forward(kind, kind.config_class(), name)


def _build(kind: Any, config: Any) -> Any:
    import torch

    with torch.device("meta"):
        return kind(config).to(torch.bfloat16)


def _own_build_error(name: str) -> str:
    """Why transformers cannot build the class at its default configuration; "" if it can."""
    import transformers

    kind = getattr(transformers, name)
    try:
        _build(kind, kind.config_class())
    except Exception as error:
        return _line(error)
    return ""


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _forward(model: Any, inputs: Any) -> None:
    from omnicompile.capture.inputs.probe import observe

    seen = observe(model, inputs.kwargs, inputs.host, inputs.seq_len, whole=True)
    if seen.error is not None:
        raise seen.error
    if seen.loss_dim != 0:
        raise ValueError(f"the loss has {seen.loss_dim} dimensions")


def _capture(model: Any, name: str) -> Any:
    from omnicompile.capture.api import capture_model

    return capture_model(model, _workload(), name=name)


def _workload() -> Any:
    from omnicompile.workload import Workload

    return Workload(seq_len=SEQ_LEN, image_size=(IMAGE_PIXELS, IMAGE_PIXELS), audio_seconds=None)


def _plan(program: Any) -> int:
    """The first of GPUS that a plan fits on."""
    from omnicompile.cluster import Cluster
    from omnicompile.errors import InfeasibleError
    from omnicompile.planner.api import plan_program

    for gpus in GPUS[:-1]:
        with contextlib.suppress(InfeasibleError):
            plan_program(program, Cluster(gpus=gpus), _workload())
            return gpus
    plan_program(program, Cluster(gpus=GPUS[-1]), _workload())
    return GPUS[-1]


def attempt(name: str, group: str, until: str) -> Outcome:
    """Run one class through the stages, in this process: as it is, and if that fails, mended."""
    try:
        kind, config = _class_to_plan(name)
    except Exception as error:
        return Outcome(name, group, "build", _line(error), build_error=_own_build_error(name))
    outcome = _attempt(name, group, until, kind, config)
    if outcome.failed or kind.__name__ != name:
        outcome.build_error = _own_build_error(name)
    if not outcome.failed:
        return outcome
    try:
        config, changed = mended_defaults.mend(kind)
    except Exception:  # the default configuration cannot even be looked at
        return outcome
    if not changed:
        return outcome
    second = _attempt(name, group, until, kind, config)
    second.mended, second.reason_as_is, second.build_error = changed, outcome.reason, outcome.build_error
    if second.failed:
        outcome.reason += f" (with {', '.join(changed)}: {second.failed}: {second.reason})"
        return outcome
    return second


def _attempt(name: str, group: str, until: str, kind: Any, config: Any) -> Outcome:
    from omnicompile.capture.inputs import make_inputs

    outcome = Outcome(name, group, part="" if kind.__name__ == name else kind.__name__)
    made: dict[str, Any] = {}
    steps = {
        "build": lambda: _build(kind, config),
        "inputs": lambda: make_inputs(made["build"], _request(made["build"])),
        "forward": lambda: _forward(made["build"], made["inputs"]),
        "capture": lambda: _capture(made["build"], name),
        "plan": lambda: _plan(made["capture"]),
    }
    # A capture makes its own inputs and runs the forward itself.
    skipped = ("inputs", "forward") if until in ("capture", "plan") else ()
    for stage in STAGES[: STAGES.index(until) + 1]:
        if stage in skipped:
            continue
        start = time.perf_counter()
        try:
            made[stage] = steps[stage]()
        except Exception as error:  # every reason is a result
            outcome.failed, outcome.reason = stage, _line(error)
        outcome.seconds[stage] = round(time.perf_counter() - start, 2)
        if outcome.failed:
            break
    outcome.gpus = made.get("plan", 0)
    outcome.notes = list(made["capture"].notes) if "capture" in made else []
    return outcome


def _child(name: str, group: str, until: str, limits: tuple[int, int], pipe: Connection) -> None:
    seconds, memory = limits
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        pipe.send(asdict(attempt(name, group, until)))


def run_all(
    todo: list[tuple[str, str]], until: str, jobs: int, limits: tuple[int, int], done: Callable[[Outcome], None]
) -> None:
    """Each class in a process of its own (forked, so that all is imported once), `jobs` at a time.

    limits: (seconds of processor time, bytes of address space) of each. done: called with every outcome.
    """
    context = multiprocessing.get_context("fork")
    running: list[tuple[str, str, Any, Any]] = []
    waiting = list(todo)
    finished = 0
    while waiting or running:
        while waiting and len(running) < jobs:
            name, group = waiting.pop(0)
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(name, group, until, limits, send))
            process.start()
            send.close()
            running.append((name, group, process, receive))
        time.sleep(0.05)
        for entry in list(running):
            outcome = _finished(*entry, limits=limits)
            if outcome is not None:
                running.remove(entry)
                done(outcome)
                finished += 1
                state = f"{outcome.failed}: {outcome.reason}" if outcome.failed else "ok"
                print(f"{finished}/{len(todo)} {outcome.name} {state}", flush=True)


def _finished(name: str, group: str, process: Any, pipe: Any, limits: tuple[int, int]) -> Outcome | None:
    if not pipe.poll():
        return None
    try:
        outcome = Outcome(**pipe.recv())
    except EOFError:
        process.join()
        code = process.exitcode
        killed = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        if killed in ("SIGXCPU", "SIGKILL"):
            return Outcome(name, group, "timeout", f"took more than {limits[0]} s of processor time")
        return Outcome(name, group, "process", f"ended by {killed}")
    process.join()
    return outcome


def _import_all() -> None:
    """What a capture and a plan need, so that each forked process finds it imported: one state of the code."""
    import importlib
    import pkgutil

    import omnicompile.anchors
    import omnicompile.capture
    import omnicompile.planner

    for package in (omnicompile.anchors, omnicompile.capture, omnicompile.planner):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)


def _commit() -> str:
    """The commit of the working tree, marked where files of the package differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True).stdout

    changed = git("status", "--porcelain", "-uno", "--", *_PRICED, __file__)
    return git("rev-parse", "--short", "HEAD").strip() + ("+" if changed.strip() else "")


def _known() -> dict[str, Outcome]:
    """Results of earlier runs."""
    path = RESULTS / "coverage.json"
    return {o["name"]: Outcome(**o) for o in json.loads(path.read_text())} if path.exists() else {}


def _store(outcomes: dict[str, Outcome], until: str) -> str:
    RESULTS.mkdir(exist_ok=True)
    ordered = [outcomes[name] for name in sorted(outcomes)]
    (RESULTS / "coverage.json").write_text(json.dumps([asdict(o) for o in ordered], indent=1) + "\n")
    text = report(ordered, until)
    (RESULTS / "coverage.md").write_text(text)
    return text


def report(outcomes: list[Outcome], until: str) -> str:
    """Markdown: counts, by group and by cause; then each class that failed, was mended or had something filled in."""
    import torch
    import transformers

    good = [o for o in outcomes if not o.failed and o.until == until]
    as_is = [o for o in good if not o.mended]
    built = [o for o in outcomes if not o.build_error]
    of_built = [o for o in good if not o.build_error]
    total = max(1, len(outcomes))
    lines = [
        f"# Coverage up to `{until}`: {len(good)} of {len(outcomes)} classes ({len(good) / total:.0%})",
        "",
        f"{len(as_is)} ({len(as_is) / total:.0%}) with the default configuration as it is, {len(good) - len(as_is)} "
        "with fields mended that keep the default configuration from running (last table).",
        f"Of the {len(built)} classes that transformers builds at their default configuration: {len(of_built)} "
        f"({len(of_built) / max(1, len(built)):.0%}), {sum(not o.mended for o in of_built)} of them as it is.",
        f"Of all that succeed, {sum(bool(o.notes) for o in good)} had a placeholder id or an image size filled in by "
        f"the capture, and {sum(bool(o.part) for o in good)} are planned by a part (table before the last).",
        "",
        f"transformers {transformers.__version__}, torch {torch.__version__}, made by "
        f"`python benchmarks/coverage.py --until {until}` "
        f"at commits {', '.join(sorted({o.commit for o in outcomes}))}; + marks uncommitted changes of files.",
        *_counts(outcomes, good, as_is),
        *_table(
            ("class", "fails at", "cause", "reason"),
            [
                (o.name, o.failed, o.cause, o.reason) if o.failed else (o.name, "", "", "not run up to this stage")
                for o in sorted(outcomes, key=lambda o: (o.cause, o.failed, o.name))
                if o.failed or o.until != until
            ],
        ),
    ]
    larger = [f"{o.name} ({o.gpus})" for o in good if o.gpus > GPUS[0]]
    if larger:
        lines += ["", f"Planned on more than {GPUS[0]} H100, which they do not fit on: {', '.join(larger)}."]
    filled = [(o.name, _filled(o)) for o in good if o.part or o.notes]
    lines += _table(("class", "what was planned"), filled)
    lines += _table(
        ("class", "mended", "cause", "as it is"),
        [(o.name, ", ".join(o.mended), o.cause, o.reason_as_is) for o in good if o.mended],
    )
    return "\n".join(lines) + "\n"


def _counts(outcomes: list[Outcome], good: list[Outcome], as_is: list[Outcome]) -> list[str]:
    groups = [
        (group, count, *(sum(o.group == group for o in some) for some in (good, as_is)))
        for group, count in Counter(o.group for o in outcomes).items()
    ]
    causes = Counter(o.cause for o in outcomes if o.cause)
    mended = Counter(o.cause for o in good if o.mended)
    return [
        *_table(("group", "classes", "succeed", "of these as is"), groups),
        *_table(
            ("why not as it is", "classes", "of these planned with fields mended"),
            [(cause, count, mended[cause]) for cause, count in sorted(causes.items())],
        ),
    ]


def _filled(outcome: Outcome) -> str:
    part = [f"its part {outcome.part}, as the class has no forward of its own"] if outcome.part else []
    return "; ".join([*part, *outcome.notes])


def _table(header: tuple[str, ...], rows: Sequence[tuple[Any, ...]]) -> list[str]:
    lines = ["", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return lines + ["| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |" for row in rows]


def main() -> None:
    if "--lower" in sys.argv[1:]:
        import lowering_coverage  # (it imports this file)

        lowering_coverage.main([a for a in sys.argv[1:] if a != "--lower"])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--until", choices=STAGES, default="plan")
    parser.add_argument("--only", nargs="*", default=None, help="class names")
    parser.add_argument("--failed", action="store_true", help="only classes that failed in the last run")
    parser.add_argument("--stale", action="store_true", help="only classes without a result of this commit")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=int, default=240, help="seconds of processor time per class")
    parser.add_argument("--memory", type=float, default=10.0, help="GiB of address space per class")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    _import_all()
    commit, everything, known = _commit(), classes(), _known()

    def wanted(name: str) -> bool:
        last = known.get(name)
        if options.only is not None:
            return name in options.only
        if last is None or last.until != options.until:
            return True
        return bool(last.failed) if options.failed else last.commit != commit if options.stale else True

    outcomes = {name: known[name] for name, _ in everything if name in known}

    def done(outcome: Outcome) -> None:
        outcome.commit, outcome.until = commit, options.until
        outcomes[outcome.name] = outcome
        _store(outcomes, options.until)

    todo = [(name, group) for name, group in everything if wanted(name)]
    if len(todo) > options.jobs:
        attempt(*everything[0], options.until)  # what a first capture imports is there when processes fork
    run_all(todo, options.until, options.jobs, (options.timeout, int(options.memory * 2**30)), done)
    print(_store(outcomes, options.until))


if __name__ == "__main__":
    main()
