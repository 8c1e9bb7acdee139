"""A simulated step in the format of chrome://tracing and ui.perfetto.dev."""

from __future__ import annotations

import json
from pathlib import Path

from omnicompile.cost_model.schedule import STREAMS
from omnicompile.cost_model.timeline import Timeline
from omnicompile.errors import InputError
from omnicompile.whole_file import write_whole

_MICROSECONDS = 1e6
STREAM_WORDS = {
    "compute": "compute",
    "intra": "communication inside the node",
    "inter": "communication between nodes",
    "copy": "copies to and from host memory",
}


def trace_events(line: Timeline, title: str) -> dict[str, object]:
    """One process, a thread per stream, a complete event ("X", microseconds) per task that takes any time."""
    events: list[dict[str, object]] = [{"ph": "M", "pid": 0, "name": "process_name", "args": {"name": title}}]
    for number, stream in enumerate(STREAMS):
        words = {"name": STREAM_WORDS.get(stream, stream)}
        events.append({"ph": "M", "pid": 0, "tid": number, "name": "thread_name", "args": words})
    for name, stream, start, end, kind, block in line.tasks:
        if end > start:
            events.append(
                {
                    "ph": "X", "pid": 0, "tid": STREAMS.index(stream), "name": kind, "cat": block or kind,
                    "ts": start * _MICROSECONDS, "dur": (end - start) * _MICROSECONDS,
                    "args": {"task": name, "block": block},
                }
            )  # fmt: skip
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def save_trace(line: Timeline, title: str, path: str | Path) -> None:
    """Raises InputError if the file cannot be written."""
    try:
        write_whole(path, json.dumps(trace_events(line, title)))
    except OSError as error:
        raise InputError(f"cannot write the trace {path}: {error}") from error
