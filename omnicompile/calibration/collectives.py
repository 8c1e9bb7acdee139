"""Collectives as step graphs call them: of several tensors at once, waited for."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import quantiles
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor

from omnicompile.calibration.allocations import allocated_peak, gpu_peak
from omnicompile.calibration.shapes import Shapes, collectives
from omnicompile.calibration.timing import Timer
from omnicompile.cost_model.measurements import CollectiveTime, Together

_c10d = torch.ops._c10d_functional


@dataclass(frozen=True)
class Ranks:
    """This rank's groups. by_size: (ranks, of them on a node) -> group."""

    rank: int
    world: int
    local: int
    by_size: dict[tuple[int, int], dist.ProcessGroup]

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def most(self, value: float) -> float:
        if self.world == 1:
            return value
        found = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return float(found)

    def mean(self, values: list[float], device: torch.device) -> list[float]:
        """Over the ranks, of each value."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        found: list[float] = (total / self.world).tolist()
        return found


def make_ranks() -> Ranks:
    """All ranks; if there are several nodes, those of a node and one of each; if a node has four or more, pairs."""
    if not dist.is_initialized():
        return Ranks(0, 1, 1, {})
    world, rank = dist.get_world_size(), dist.get_rank()
    local = min(world, int(os.environ.get("LOCAL_WORLD_SIZE", str(world))))
    wanted = [list(range(world))]
    if local < world:
        wanted += [list(range(start, start + local)) for start in range(0, world, local)] if local > 1 else []
        wanted += [list(range(start, world, local)) for start in range(local)] if local > 1 else []
    if local >= 4:
        wanted += [[start, start + 1] for start in range(0, world, 2)]
    by_size: dict[tuple[int, int], dist.ProcessGroup] = {}
    for members in wanted:
        group = dist.new_group(members)
        if rank in members:
            on_node = sum(member // local == rank // local for member in members)
            by_size[len(members), on_node] = group
    return Ranks(rank, world, local, by_size)


def time_collectives(shapes: Shapes, ranks: Ranks, timer: Timer, say: Callable[[str], None]) -> list[CollectiveTime]:
    """Seconds of the slowest rank."""
    found = []
    for shape in collectives(shapes.message_bytes, ranks.by_size):
        group = ranks.by_size[shape.ranks, shape.ranks_per_node]
        found.append(replace(shape, seconds=ranks.most(_seconds(shape, group, timer))))
        if shape.nbytes == shapes.message_bytes[-1]:
            say(f"{shape.kind} over {shape.ranks} ranks")
    return found


def _seconds(shape: CollectiveTime, group: dist.ProcessGroup, timer: Timer) -> float:
    run = operation(shape, group, timer.device)
    run()
    if timer.device.type == "cuda":
        return timer.seconds(lambda call: run())
    samples = []
    for _ in range(max(timer.repeats, min(50, 5 * 2**20 // shape.nbytes))):
        dist.barrier()
        start = perf_counter()
        run()
        samples.append(perf_counter() - start)
    return quantiles(samples, n=4, method="inclusive")[0]


def operation(shape: CollectiveTime, group: dist.ProcessGroup, device: torch.device) -> Callable[[], object]:
    """Does the collective once and waits for it."""
    start = launcher(shape, group, device)
    return lambda: _wait(start())


def launcher(shape: CollectiveTime, group: dist.ProcessGroup, device: torch.device) -> Callable[[], list[Tensor]]:
    """Starts the collective; what it returns is to be waited for."""
    size, name = shape.ranks, group.group_name
    numel = max(1, shape.nbytes // (4 * size * shape.tensors)) * size
    whole = [torch.ones(numel, device=device) for _ in range(shape.tensors)]
    parts = [tensor[: numel // size].clone() for tensor in whole]
    each = [numel // size] * size
    starts: dict[str, Callable[[], list[Tensor]]] = {
        "all_gather": lambda: _c10d.all_gather_into_tensor_coalesced(parts, size, name),
        "reduce_scatter": lambda: _scatter(whole, size, name),
        "all_reduce": lambda: [_c10d.all_reduce(whole[0], "sum", name)],
        "all_to_all": lambda: [_c10d.all_to_all_single(whole[0], each, each, name)],
    }
    return starts[shape.kind]


def _scatter(whole: list[Tensor], ranks: int, group: str) -> list[Tensor]:
    """As step graphs do it: on CPUs in one buffer (passes/pack_scatters.py)."""
    if len(whole) == 1 or whole[0].device.type != "cpu":
        together: list[Tensor] = _c10d.reduce_scatter_tensor_coalesced(whole, "sum", ranks, group)
        return together
    flat = torch.cat([tensor.view(ranks, -1) for tensor in whole], 1).view(-1)
    return [_c10d.reduce_scatter_tensor(flat, "sum", ranks, group)]


def _wait(started: list[Tensor]) -> list[Tensor]:
    return [_c10d.wait_tensor(tensor) for tensor in started]


def copies(kind: str, ranks: Ranks, device: torch.device, tensors: int, nbytes: int = 2**22) -> float:
    """Bytes that a reduce-scatter or all-gather of `tensors` whole tensors, together of `nbytes`, holds besides what it
    reads and gives, relative to `nbytes`. Several tensors to scatter are packed into one where that is quicker, and
    that copy is gone when the collective is under way: what it holds then is that of one tensor."""
    size = (ranks.world, ranks.local)
    shape = CollectiveTime(kind, nbytes, *size, tensors, 0.0)
    given = nbytes if kind == "all_gather" else nbytes / ranks.world
    run = operation(shape, ranks.by_size[size], device)
    run()
    dist.barrier()
    peak = gpu_peak(run, device) if device.type == "cuda" else allocated_peak(run)
    return ranks.most(max(0.0, (peak - given) / nbytes))


def time_together(shapes: Shapes, ranks: Ranks, timer: Timer) -> list[Together]:
    """GEMMs and an all-gather of all ranks, one after the other and at once: of each the quickest of some turns."""
    size = (ranks.world, ranks.local)
    found = []
    for sizes, number, nbytes in shapes.beside:
        m, n, k = sizes
        dtype = torch.float32 if timer.device.type == "cpu" else torch.bfloat16
        a = torch.ones(m, k, device=timer.device, dtype=dtype)
        b = torch.ones(k, n, device=timer.device, dtype=dtype)
        start = launcher(CollectiveTime("all_gather", nbytes, *size, 1, 0.0), ranks.by_size[size], timer.device)

        def compute(number: int = number, a: Tensor = a, b: Tensor = b) -> None:
            for _ in range(number):
                torch.mm(a, b)

        alone, moved, beside, both = [], [], [], []
        for _ in range(2 * timer.repeats):
            alone += _spans(timer, [compute])
            moved += _spans(timer, [lambda begin=start: _wait(begin())])  # type: ignore[misc]
            computed, done = _beside(timer, start, compute)
            beside.append(computed)
            both.append(done)
        values = [min(alone), min(moved), min(beside), min(both)]
        found.append(Together(*ranks.mean(values, timer.device)))
    return found


def _spans(timer: Timer, parts: list[Callable[[], object]]) -> list[float]:
    """Seconds from a common start of the ranks to the end of each part, one after the other."""
    _finish(timer)
    timer.together()
    _finish(timer)
    start, ends = perf_counter(), []
    for part in parts:
        part()
        _finish(timer)
        ends.append(perf_counter() - start)
    return ends


def _beside(timer: Timer, start: Callable[[], list[Tensor]], compute: Callable[[], None]) -> tuple[float, float]:
    """(until the GEMMs are done, until both are)"""
    started: list[Tensor] = []

    def launch_and_compute() -> None:
        started.extend(start())
        compute()

    computed, both = _spans(timer, [launch_and_compute, lambda: _wait(started)])
    return computed, both


def _finish(timer: Timer) -> None:
    if timer.device.type == "cuda":
        torch.cuda.synchronize(timer.device)
