"""Most memory that a piece of work allocates."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def allocated_peak(step: Callable[[], Any]) -> int:
    """Most bytes that `step` holds of torch's CPU allocator beyond what was held before it, by the profiler's record of
    every allocation: of operators, compiled code and collectives alike."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    return peak_of([event for event in events if event.get("name") == "[memory]"])


def peak_of(events: Sequence[dict[str, Any]]) -> int:
    """Highest running sum of the bytes (negative when freed) of allocator events, in the order of time."""
    total = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        total += int(event["args"]["Bytes"])
        peak = max(peak, total)
    return peak


def gpu_peak(step: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that `step` holds of torch's CUDA allocator beyond what was held before it."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - before)
