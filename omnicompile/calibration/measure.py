"""One rank's part of a calibration: everything is timed while the other ranks time the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor

from omnicompile.calibration import kernels
from omnicompile.calibration.collectives import Ranks, copies, time_collectives, time_together
from omnicompile.calibration.machine import describe
from omnicompile.calibration.shapes import Shapes, cpu_shapes, gpu_shapes
from omnicompile.calibration.timing import Timer
from omnicompile.cost_model.measurements import GemmTime, Measurements

Say = Callable[[str], None]
S = TypeVar("S")
HOST_COPIES = (2**20, 2**24, 2**28)


@dataclass(frozen=True)
class Session:
    """notes: what could not be measured, and why."""

    shapes: Shapes
    ranks: Ranks
    timer: Timer
    place: kernels.Place
    say: Say
    notes: list[str]

    def times(self, what: str, wanted: Sequence[S]) -> tuple[S, ...]:
        """Mean over the ranks; without shapes that this machine does not run."""
        self.say(f"{what}: {len(wanted)} shapes")
        values = [self._seconds(shape) for shape in wanted]
        means = self.ranks.mean(values, self.timer.device)
        found = tuple(replace(shape, seconds=value) for shape, value in zip(wanted, means) if value > 0)  # type: ignore[type-var]
        if len(found) < len(wanted):
            self.notes.append(f"{what}: {len(wanted) - len(found)} of {len(wanted)} shapes do not run here")
        return found

    def _seconds(self, shape: object) -> float:
        try:
            return self.timer.seconds(kernels.work(shape, self.place))
        except (RuntimeError, NotImplementedError):
            return float("-inf")
        finally:
            if self.timer.device.type == "cuda":
                torch.cuda.empty_cache()


def session(device: torch.device, ranks: Ranks, quick: bool, say: Say) -> Session:
    shapes = gpu_shapes(quick, gpu_dtypes(device)) if device.type == "cuda" else cpu_shapes(quick)
    timer = Timer(device, shapes.repeats, shapes.shortest, ranks.barrier, ranks.most)
    return Session(shapes, ranks, timer, kernels.Place(device, shapes.rotated), say, [])


def gpu_dtypes(device: torch.device) -> tuple[str, ...]:
    """What the GPU's matrix units multiply."""
    capability = torch.cuda.get_device_capability(device)
    dtypes: tuple[str, ...] = ("float16", "float32")
    if capability >= (8, 0):
        dtypes = ("bfloat16", "float16", "tfloat32", "float32")
    return (*dtypes, "float8") if capability >= (8, 9) else dtypes


@torch.no_grad()
def measure(device: torch.device, ranks: Ranks, quick: bool, name: str, say: Say) -> Measurements:
    """All ranks together. name: of the hardware, "" for the device's own."""
    run = session(device, ranks, quick, say)
    shapes = run.shapes
    machine = describe(device, ranks.world, ranks.local, name)
    launch = ranks.mean([run.timer.seconds(kernels.launch(run.place))], device)[0]
    memory = run.times("memory", shapes.memory)
    gemms: list[GemmTime] = []
    for dtype in dict.fromkeys(shape.dtype for shape in shapes.gemms):
        gemms += run.times(f"GEMM {dtype}", [shape for shape in shapes.gemms if shape.dtype == dtype])
    grouped = run.times("grouped GEMM", shapes.grouped)
    attention = run.times("attention", shapes.attention)
    several = ranks.world > 1
    collectives = time_collectives(shapes, ranks, run.timer, say) if several else []
    together = time_together(shapes, ranks, run.timer) if several else []
    if device.type == "cuda":
        machine = replace(machine, context_bytes=describe(device, ranks.world, ranks.local, name).context_bytes)
    return Measurements(
        machine=machine,
        launch=launch,
        gemms=tuple(gemms),
        grouped=grouped,
        attention=attention,
        memory=memory,
        collectives=tuple(collectives),
        together=tuple(together),
        host_copy=tuple(_host_copies(run)),
        sustained=_sustained(run) if shapes.sustained else None,
        reduce_copies=copies("reduce_scatter", ranks, device, 1) if several else 0.0,
        gather_copies=copies("all_gather", ranks, device, 4) if several else 0.0,
        notes=tuple(run.notes),
    )


def _host_copies(run: Session) -> Iterator[tuple[int, float]]:
    if run.timer.device.type != "cuda":
        return
    for nbytes in HOST_COPIES:
        seconds = run.timer.seconds(kernels.host_copy(nbytes, run.place))
        yield nbytes, run.ranks.mean([seconds], run.timer.device)[0]


def _sustained(run: Session) -> float:
    """Rate of large GEMMs at the end of `shapes.sustained` seconds of them, relative to the first tenth of a second."""
    shape = max((s for s in run.shapes.gemms if s.dtype == run.shapes.gemms[0].dtype), key=lambda s: s.m * s.n * s.k)
    work = kernels.work(shape, run.place)
    run.say(f"clocks: GEMMs for {run.shapes.sustained:.0f} s")
    work(0)
    device = run.timer.device
    rates, begin = [], perf_counter()
    while perf_counter() - begin < run.shapes.sustained:
        rates.append(_rate(work, device, 0.1))
    last = rates[-max(1, len(rates) // 5) :]
    return min(1.0, run.ranks.mean([sum(last) / len(last) / rates[0]], device)[0])


def _rate(work: Callable[[int], Any], device: torch.device, seconds: float) -> float:
    """Calls a second, over about `seconds`."""
    start, calls = perf_counter(), 0
    while perf_counter() - start < seconds:
        for _ in range(4):
            result: Tensor = work(calls)
            calls += 1
        if result.device.type == "cuda":
            torch.cuda.synchronize(device)
    return calls / (perf_counter() - start)
