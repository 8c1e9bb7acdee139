"""A trace of one step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def profiled(wanted: tuple[int, Path] | None, step: int, rank: int) -> Iterator[Path | None]:
    """Record what is inside if it is the step that is wanted, on rank 0, as a Chrome trace (chrome://tracing,
    ui.perfetto.dev). Gives the trace's path, which is written at the end of the context; None for other steps."""
    if wanted is None or wanted[0] != step or rank != 0:
        yield None
        return
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    wanted[1].mkdir(parents=True, exist_ok=True)
    path = wanted[1] / f"step-{step}.json"
    with torch.profiler.profile(activities=kinds, record_shapes=True) as profile:
        yield path
    profile.export_chrome_trace(str(path))
