"""How many Hugging Face classes are captured and planned, at their default configuration and unmodified.

Goes over every class of transformers' multimodal-LM and image-text-to-text mappings and every causal LM whose default
configuration has experts. Stages: build (on the meta device), inputs, forward (fake, to a scalar loss), capture, plan.
Some default configurations cannot run in any framework: no placeholder token ids, a vision tower wider than the text
that it feeds. A class that fails as it is, is tried again with such fields mended (by general rules, `mend`), and
counted apart.
Prints how many succeed, with the reason for each that does not; writes benchmarks/results/coverage.json and .md.

    python benchmarks/coverage.py [--until forward|capture|plan] [--only NAME ...] [--jobs 2]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import resource
import signal
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

STAGES = ("build", "inputs", "forward", "capture", "plan")
RESULTS = Path(__file__).parent / "results"
SEQ_LEN, IMAGE_PIXELS, AUDIO_SECONDS, GPUS = 4096, 448, 10.0, 128
EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")


@dataclass
class Outcome:
    """What became of one class. failed: the stage that failed, "" if all went well. seconds: per stage that ran.
    mended: fields of the default configuration that were changed, and reason_as_is: why it failed without."""

    name: str
    group: str
    failed: str = ""
    reason: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    mended: list[str] = field(default_factory=list)
    reason_as_is: str = ""


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


def _build(name: str, config: Any = None) -> Any:
    import torch
    import transformers

    kind = getattr(transformers, name)
    with torch.device("meta"):
        return kind(kind.config_class() if config is None else config).to(torch.bfloat16)


PLACEHOLDER_FIELDS = ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index", "video_token_id")
TOWER_OUTPUT_FIELDS = ("out_hidden_size", "output_dim", "output_proj_dim")


def mend(name: str) -> tuple[Any, list[str]]:
    """The default configuration of class `name` with what keeps it from running changed, and what was changed.

    Placeholder token ids that are not set get the last ids of the vocabulary; a tower's output gets the width of the
    text that it feeds; the rotated part of a head is what its sections sum up to; heads divide the width;
    attention dropout, which the attention operator refuses, is 0.
    """
    import transformers

    config = getattr(transformers, name).config_class()
    text = config.get_text_config()
    changed: list[str] = []

    def put(owner: Any, path: str, key: str, value: Any) -> None:
        setattr(owner, key, value)
        changed.append(f"{path}{key}={value}")

    def walk(owner: Any, path: str) -> None:
        for key, value in list(vars(owner).items()):
            if hasattr(value, "to_dict"):
                walk(value, f"{path}{key}.")
            elif re.search(r"att.*drop", key) and isinstance(value, float) and value > 0:
                put(owner, path, key, 0.0)
            elif key in TOWER_OUTPUT_FIELDS and owner is not text and value not in (None, text.hidden_size):
                put(owner, path, key, text.hidden_size)

    walk(config, "")
    for owner, path in _with_heads(config, ""):
        heads = max(n for n in range(1, owner.num_attention_heads + 1) if owner.hidden_size % n == 0)
        if heads != owner.num_attention_heads and getattr(owner, "head_dim", None) is None:
            put(owner, path, "num_attention_heads", heads)
    rope = getattr(text, "rope_parameters", None) or {}
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rotated = 2 * sum(rope.get("mrope_section") or [])
    if rotated and rotated != head_dim * rope.get("partial_rotary_factor", 1.0):
        rope["partial_rotary_factor"] = rotated / head_dim
        changed.append(f"rope_parameters.partial_rotary_factor={rotated / head_dim}")
    for number, key in enumerate(PLACEHOLDER_FIELDS, 1):
        if hasattr(config, key) and getattr(config, key) is None:
            put(config, "", key, text.vocab_size - number)
    return config, changed


def _with_heads(config: Any, path: str) -> list[tuple[Any, str]]:
    """The configurations that state a width and a number of heads, with their paths."""
    found = []
    if all(isinstance(getattr(config, key, None), int) for key in ("hidden_size", "num_attention_heads")):
        found.append((config, path))
    for key, value in vars(config).items():
        if hasattr(value, "to_dict"):
            found += _with_heads(value, f"{path}{key}.")
    return found


def _forward(model: Any, inputs: Any) -> None:
    from omnicompile.capture.inputs.probe import observe

    seen = observe(model, inputs.kwargs, inputs.host, inputs.seq_len, whole=True)
    if seen.error is not None:
        raise seen.error
    if seen.loss_dim != 0:
        raise ValueError(f"the loss has {seen.loss_dim} dimensions")


def _capture(name: str, config: Any) -> Any:
    from omnicompile.capture.api import capture_model

    return capture_model(_build(name, config), _workload(), name=name)


def _workload() -> Any:
    from omnicompile.workload import Workload

    return Workload(seq_len=SEQ_LEN, image_size=(IMAGE_PIXELS, IMAGE_PIXELS), audio_seconds=None)


def _plan(program: Any) -> Any:
    from omnicompile.cluster import Cluster
    from omnicompile.planner.api import plan_program

    return plan_program(program, Cluster(gpus=GPUS), _workload())


def attempt(name: str, group: str, until: str) -> Outcome:
    """Run one class through the stages, in this process: as it is, and if that fails, mended."""
    outcome = _attempt(name, group, until, None)
    if not outcome.failed:
        return outcome
    try:
        config, changed = mend(name)
    except Exception:  # the default configuration cannot even be looked at
        return outcome
    if not changed:
        return outcome
    second = _attempt(name, group, until, config)
    second.mended, second.reason_as_is = changed, outcome.reason
    return second if not second.failed else outcome


def _attempt(name: str, group: str, until: str, config: Any) -> Outcome:
    from omnicompile.capture.inputs import make_inputs

    outcome = Outcome(name, group)
    made: dict[str, Any] = {}
    steps = {
        "build": lambda: _build(name, config),
        "inputs": lambda: make_inputs(made["build"], _request(made["build"])),
        "forward": lambda: _forward(made["build"], made["inputs"]),
        "capture": lambda: _capture(name, config),
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
            outcome.failed = stage
            outcome.reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        outcome.seconds[stage] = round(time.perf_counter() - start, 2)
        if outcome.failed:
            break
    return outcome


def _child(name: str, group: str, until: str, memory: int, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        pipe.send(asdict(attempt(name, group, until)))


def run_all(todo: list[tuple[str, str]], until: str, jobs: int, timeout: float, memory: int) -> list[Outcome]:
    """Each class in a process of its own (forked, so that torch is imported once), `jobs` at a time."""
    context = multiprocessing.get_context("fork")
    running: list[tuple[str, str, Any, Any, float]] = []
    outcomes: list[Outcome] = []
    waiting = list(todo)
    while waiting or running:
        while waiting and len(running) < jobs:
            name, group = waiting.pop(0)
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(name, group, until, memory, send))
            process.start()
            send.close()
            running.append((name, group, process, receive, time.monotonic()))
        time.sleep(0.05)
        for entry in list(running):
            outcome = _finished(*entry, timeout=timeout)
            if outcome is not None:
                running.remove(entry)
                outcomes.append(outcome)
                state = f"{outcome.failed}: {outcome.reason}" if outcome.failed else "ok"
                print(f"{len(outcomes)}/{len(todo)} {outcome.name} {state}", flush=True)
    return outcomes


def _finished(name: str, group: str, process: Any, pipe: Any, start: float, timeout: float) -> Outcome | None:
    if pipe.poll():
        try:
            outcome = Outcome(**pipe.recv())
        except EOFError:
            process.join()
            code = process.exitcode
            killed = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
            return Outcome(name, group, "process", f"ended by {killed}")
        process.join()
        return outcome
    if time.monotonic() - start > timeout:
        process.kill()
        process.join()
        return Outcome(name, group, "timeout", f"took more than {timeout:.0f} s")
    return None


def report(outcomes: list[Outcome], until: str) -> str:
    """Markdown: counts per group, then each class that failed with its reason."""
    import torch
    import transformers

    good = [o for o in outcomes if not o.failed]
    as_is = [o for o in good if not o.mended]
    total = max(1, len(outcomes))
    lines = [
        f"# Coverage up to `{until}`: {len(good)} of {len(outcomes)} classes ({len(good) / total:.0%})",
        "",
        f"{len(as_is)} ({len(as_is) / total:.0%}) with the default configuration as it is, {len(good) - len(as_is)} "
        "with fields mended that keep the default configuration from running (last table).",
        "",
        f"transformers {transformers.__version__}, torch {torch.__version__}, made by "
        f"`python benchmarks/coverage.py --until {until}`.",
        "",
        "| group | classes | succeed | of these as is |",
        "|---|---|---|---|",
    ]
    for group, count in Counter(o.group for o in outcomes).items():
        of_group = [sum(o.group == group for o in some) for some in (good, as_is)]
        lines.append(f"| {group} | {count} | {of_group[0]} | {of_group[1]} |")
    lines += ["", "| class | fails at | reason |", "|---|---|---|"]
    for o in sorted(outcomes, key=lambda o: (o.failed, o.name)):
        if o.failed:
            lines.append(f"| {o.name} | {o.failed} | {o.reason.replace('|', '/')} |")
    lines += ["", "| class | mended | as it is |", "|---|---|---|"]
    for o in sorted(good, key=lambda o: o.name):
        if o.mended:
            lines.append(f"| {o.name} | {', '.join(o.mended)} | {o.reason_as_is.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--until", choices=STAGES, default="plan")
    parser.add_argument("--only", nargs="*", default=None, help="class names")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds per class")
    parser.add_argument("--memory", type=float, default=10.0, help="GiB of address space per class")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    todo = [(n, g) for n, g in classes() if options.only is None or n in options.only]
    outcomes = run_all(todo, options.until, options.jobs, options.timeout, int(options.memory * 2**30))
    outcomes.sort(key=lambda o: o.name)
    text = report(outcomes, options.until)
    print(text)
    if options.only is None:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "coverage.json").write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n")
        (RESULTS / "coverage.md").write_text(text)


if __name__ == "__main__":
    main()
