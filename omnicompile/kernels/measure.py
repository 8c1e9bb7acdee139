"""Times of implementations on the present device, measured once for a class of shapes and kept in a file.

The file lies under OMNICOMPILE_CACHE (or XDG_CACHE_HOME, or ~/.cache), one for each device and set of versions: with
another torch, triton or kernel package times are measured again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from omnicompile.kernels.registry import INDUCTOR, Functions, Kernel, Problem, version_of
from omnicompile.kernels.samples import Run, sample, shape_class
from omnicompile.kernels.table import find_kernel
from omnicompile.whole_file import write_whole

logger = logging.getLogger(__name__)
_PACKAGES = ("torch", "triton", "flash-attn", "flash-attn-4", "liger-kernel")
_WARM, _REPEATS = 3, 7

Timer = Callable[[Callable[[], object], torch.device], float]


@dataclass
class Measurements:
    """timer: seconds of a call on a device; tests give their own."""

    device: torch.device
    timer: Timer = field(default_factory=lambda: cuda_seconds)
    folder: Path = field(default_factory=lambda: cache_folder())

    def fastest(self, problem: Problem, kernels: Iterable[Kernel]) -> Kernel:
        """Of `kernels`, all able to compute the problem. One that fails to run is left out, with a warning; where none
        runs it is the reference."""
        times = self.times(shape_class(problem), list(kernels))
        usable = {name: seconds for name, seconds in times.items() if seconds is not None}
        return find_kernel(problem.operator, min(usable, key=lambda name: usable[name], default="reference"))

    def times(self, problem: Problem, kernels: list[Kernel]) -> dict[str, float | None]:
        """Seconds of forward and backward by name, None where it does not run; measured where the file has none."""
        known = self._load()
        entry = known.setdefault(_label(problem), {})
        missing = [kernel for kernel in kernels if kernel.name not in entry]
        if missing:
            run = sample(problem, self.device)
            for kernel in missing:
                entry[kernel.name] = self._seconds(kernel, run)
            del run
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._save(known)
        return {kernel.name: entry[kernel.name] for kernel in kernels}

    def _seconds(self, kernel: Kernel, run: Run) -> float | None:
        try:
            functions = _compiled(kernel.operator) if kernel.name == INDUCTOR else kernel.functions()
            return self.timer(lambda: run(functions), self.device)
        except Exception as error:  # any package's way to say that it does not run here
            cause = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            logger.warning("%s by %s does not run here: %s", kernel.operator, kernel.name, cause)
            return None

    @property
    def path(self) -> Path:
        facts = json.dumps(self._facts(), sort_keys=True)
        return self.folder / f"kernels-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.json"

    def _facts(self) -> dict[str, str | None]:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return {"device": name} | {package: version_of(package) for package in _PACKAGES}

    def _load(self) -> dict[str, dict[str, float | None]]:
        """An unreadable file is as none: times are measured again."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))["seconds"]
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return found if isinstance(found, dict) else {}

    def _save(self, known: Mapping[str, Mapping[str, float | None]]) -> None:
        """Several processes may measure at a time; the last one's file stands. Without a place to write, times are
        measured in each run."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, json.dumps({**self._facts(), "seconds": known}, indent=1))
        except OSError as error:
            logger.warning("times of kernels cannot be kept in %s: %s", self.path, error)


def cache_folder() -> Path:
    root = os.environ.get("OMNICOMPILE_CACHE") or os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "omnicompile"


def cuda_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median of several runs, by the device's own clock."""
    for _ in range(_WARM):
        call()
    spans = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        spans.append((start, end))
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in spans) / 1000.0


def _compiled(operator: str) -> Functions:
    """What the compiler makes of the operator by itself. In a model it also fuses it with what is around it."""
    plain = find_kernel(operator, "reference").functions()
    return Functions(torch.compile(plain.forward), torch.compile(plain.backward))


def _label(problem: Problem) -> str:
    facts = "+".join(sorted(problem.facts))
    shape = "x".join(map(str, problem.shape))
    dtype = str(problem.dtype).removeprefix("torch.")
    return f"{problem.operator}.{problem.variant} {dtype} {shape} head {problem.head_size} {facts}".strip()
