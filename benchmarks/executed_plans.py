"""The plans of `simulated_vs_executed.py`, one rank's measurements of them, and what the planner predicts."""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fsdp2_contestants import Size, build_model, make_batch, parallelized
from torch import Tensor, nn

from omnicompile.calibration.allocations import allocated_peak, gpu_peak
from omnicompile.capture.api import capture_model
from omnicompile.cluster import Cluster
from omnicompile.cost_model.step_model import StepModel
from omnicompile.plan import BlockPlan, Layout, LossHead, Mesh, Plan, Prediction, Sharding
from omnicompile.planner.predict import simulate
from omnicompile.program import Program
from omnicompile.recompute import Recompute
from omnicompile.workload import Workload

BACKEND = "inductor"
OVERHEAD = ("context", "allocator slack")
"""Of a prediction's memory: what no tensor of a step is."""


@dataclass(frozen=True)
class Case:
    """A model of `kind` and `size` under a plan. rows: sequences of a micro-batch. family: cases that train the same
    model, so that their tokens/s can be ranked."""

    name: str
    family: str
    kind: str
    size: Size
    mesh: Mesh
    sharding: Sharding = Sharding.FSDP
    recompute: Recompute = Recompute.NONE
    loss_head: LossHead = LossHead.FULL
    rows: int = 1

    def plan(self, gpu: str, dtype: str) -> Plan:
        """gpu: the calibrated hardware file."""
        layout = Layout.SEQUENCE if self.mesh.sp > 1 else Layout.BATCH
        block = BlockPlan(self.sharding, layout, self.mesh.sp, self.mesh.ep, self.recompute)
        cluster = Cluster(self.mesh.world, gpu, self.mesh.world)
        plan = Plan(self.name, cluster, self.workload(), self.mesh, {"text": block}, self.rows)
        if self.kind == "vlm":
            plan = replace(plan, blocks={"vision": block, "text": block})
        return replace(plan, loss_head=self.loss_head, param_dtype=dtype, reduce_dtype="float32")

    def workload(self) -> Workload:
        """The sample that `make_batch` makes rows of."""
        batch = self.rows * self.mesh.data_ranks
        if self.kind != "vlm":
            return Workload(self.size.tokens, global_batch=batch)
        side = 8 * int((self.size.patches // 2) ** 0.5) // 16 * 16  # two images; patches of 8 pixels, merged 2 x 2
        return Workload(self.size.tokens, images=2, image_size=(side, side), global_batch=batch)

    def batch(self, rank: int) -> dict[str, Tensor]:
        """Ranks of one sequence-parallel group get the same."""
        made = [make_batch(self.kind, self.size, rank // self.mesh.sp * self.rows + row) for row in range(self.rows)]
        return {name: torch.cat([batch[name] for batch in made]) for name in made[0]}

    @property
    def tokens(self) -> int:
        """Of a step, over all ranks."""
        return self.size.tokens * self.rows * self.mesh.data_ranks


_DENSE, _MIXED = Size(512, 4, 512, 4096, head=64), Size(512, 3, 512, 4096, head=64)
_WIDE = Size(256, 2, 512, 8192, head=64)
CPU_CASES = (
    Case("dense fsdp", "dense", "dense", _DENSE, Mesh(dp_shard=2)),
    Case("dense sp2", "dense", "dense", _DENSE, Mesh(sp=2)),
    Case("dense replicate", "dense", "dense", _DENSE, Mesh(dp_replicate=2), Sharding.REPLICATE),
    Case("dense fsdp full recompute", "dense", "dense", _DENSE, Mesh(dp_shard=2), recompute=Recompute.FULL),
    Case("vlm fsdp sp2", "vlm", "vlm", _MIXED, Mesh(sp=2)),
    Case("vlm fsdp", "vlm", "vlm", _MIXED, Mesh(dp_shard=2)),
    Case("moe ep2", "moe", "moe", _MIXED, Mesh(dp_shard=2, ep=2)),
    Case("moe fsdp", "moe", "moe", _MIXED, Mesh(dp_shard=2)),
    Case("vocabulary whole", "wide", "dense", _WIDE, Mesh(dp_shard=2), rows=5),
    Case("vocabulary chunked", "wide", "dense", _WIDE, Mesh(dp_shard=2), loss_head=LossHead.CHUNKED, rows=5),
)

_G, _ONE = Size(2048, 8, 4096, 32768, head=128), Mesh(dp_shard=1)
_GV, _GM = Size(2048, 4, 4096, 32768, 2048, head=128), Size(2048, 4, 4096, 32768, head=128)
GPU_CASES = (
    Case("dense", "dense", "dense", _G, _ONE),
    Case("dense full recompute", "dense", "dense", _G, _ONE, recompute=Recompute.FULL),
    Case("dense selective", "dense", "dense", _G, _ONE, recompute=Recompute.SELECTIVE),
    Case("dense chunked", "dense", "dense", _G, _ONE, loss_head=LossHead.CHUNKED, rows=2),
    Case("dense long", "long", "dense", replace(_G, tokens=16384), _ONE, recompute=Recompute.FULL),
    Case("dense wide", "wide", "dense", Size(4096, 4, 4096, 32768, head=128), _ONE),
    Case("vlm", "vlm", "vlm", _GV, _ONE),
    Case("moe", "moe", "moe", _GM, _ONE),
)


def cases(gpu: bool) -> dict[str, Case]:
    """By name."""
    return {case.name: case for case in (GPU_CASES if gpu else CPU_CASES)}


# Predicted ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Predicted:
    """step: seconds. peak: bytes of a rank's tensors. memory: bytes by kind at the peak. compute: seconds by kind of
    operator; time: seconds by kind, as `Prediction.time`."""

    step: float
    peak: float
    memory: dict[str, float]
    compute: dict[str, float]
    time: dict[str, float]


class Predictor:
    """Predictions on one hardware file; equal models are captured once."""

    def __init__(self, hardware: str, dtype: str) -> None:
        self.hardware, self.dtype = hardware, dtype
        self._programs: dict[tuple[object, ...], Program] = {}

    def __call__(self, case: Case) -> Predicted:
        plan, program = case.plan(self.hardware, self.dtype), self._program(case)
        model = StepModel(program, plan.cluster)
        found = simulate(program, plan, model).prediction
        assert found is not None
        return Predicted(
            found.step_seconds, tensor_bytes(found), found.memory, compute_by_kind(model, plan), found.time
        )

    def _program(self, case: Case) -> Program:
        key = (case.kind, case.size)
        if key not in self._programs:
            model = build_model(case.kind, case.size).to(getattr(torch, self.dtype))
            self._programs[key] = capture_model(model, case.workload())
        return self._programs[key]


def tensor_bytes(prediction: Prediction) -> float:
    """Predicted bytes at the peak, of tensors."""
    return sum(nbytes for kind, nbytes in prediction.memory.items() if kind not in OVERHEAD)


def compute_by_kind(model: StepModel, plan: Plan) -> dict[str, float]:
    """Seconds of a micro-step's operators by kind on one rank; what is computed again is not counted."""
    from omnicompile.cost_model.step_layout import block_split

    seconds: dict[str, float] = {}
    numbers, prices = model.numbers.at(plan.micro_batch), model.prices(plan.stack)
    for found in numbers.segments.values():
        segment, block = found.segment, plan.blocks[found.segment.block]
        split = block_split(block, plan.mesh, numbers.units[segment.block])
        for op in found.ops:
            kind = str(op.op.kind)
            seconds[kind] = seconds.get(kind, 0.0) + segment.count * prices.op(op, split, block.ep)
    return seconds


# Executed -------------------------------------------------------------------------------------------------------------


@dataclass
class Executed:
    """step: seconds of every repeat, the slowest rank's. cpu: CPU seconds of it, averaged over ranks. peak: bytes of a
    rank's tensors, the most of all ranks, median of `peaks`, some steps'; held: of them between steps. compute: seconds
    of a profiled step's operators by kind, on the first rank. losses: of every step."""

    step: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak: int = 0
    peaks: list[int] = field(default_factory=list)
    held: int = 0
    compute: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)


class Execution:
    """A case's model and optimizer in this process, and training steps of it."""

    def __init__(self, case: Case, device: torch.device, backend: str) -> None:
        dtype = "bfloat16" if device.type == "cuda" else "float32"
        self.case, self.device, self.seen = case, device, Executed()
        batch, model = case.batch(dist.get_rank()), build_model(case.kind, case.size)
        self.module: nn.Module = parallelized(model, case.plan("h100", dtype), device, batch, backend)
        self.batch = {name: value.to(device) for name, value in batch.items()}
        # The optimizer that the planner prices: one pass over weights, gradients and moments.
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4, fused=True)

    def step(self) -> None:
        loss = self.module(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seen.losses.append(loss.item())

    def timed_step(self) -> None:
        dist.barrier()
        start, cpu = time.perf_counter(), time.process_time()
        self.step()
        end, cpu = time.perf_counter(), time.process_time() - cpu
        slowest, used = (torch.tensor(value, device=self.device) for value in (end - start, cpu))
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        dist.all_reduce(used)
        self.seen.step.append(round(slowest.item(), 6))
        self.seen.cpu.append(round(used.item() / dist.get_world_size(), 6))

    def held_bytes(self) -> int:
        """Of what is kept between steps: parameters, buffers, optimizer states."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        tensors += [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        return sum(t.untyped_storage().nbytes() for t in tensors)

    def measure_peak(self, steps: int = 5) -> None:
        """Of several steps: what is on its way at a time differs between steps where threads exchange it."""
        gc.collect()
        held = self.held_bytes()
        gpu = self.device.type == "cuda"
        for _ in range(steps):
            peak = held + (gpu_peak(self.step, self.device) if gpu else allocated_peak(self.step))
            both = torch.tensor([peak, held], device=self.device)
            dist.all_reduce(both, op=dist.ReduceOp.MAX)
            highest, self.seen.held = both.tolist()
            self.seen.peaks.append(highest)
        self.seen.peak = int(statistics.median(self.seen.peaks))

    def profile(self) -> None:
        """Seconds of operators by kind: of each operator the least of three steps."""
        least: dict[str, list[float]] = {}
        for _ in range(3):
            found = self._operators()
            for kind, seconds in found.items():
                earlier = least.get(kind, [float("inf")] * len(seconds))
                least[kind] = [min(a, b) for a, b in zip(earlier, seconds, strict=True)]
        self.seen.compute = {kind: sum(seconds) for kind, seconds in least.items()}

    def _operators(self) -> dict[str, list[float]]:
        kinds = torch.profiler.ProfilerActivity
        gpu = self.device.type == "cuda"
        with torch.profiler.profile(activities=[kinds.CPU, *([kinds.CUDA] if gpu else [])]) as profile:
            self.step()
        found: dict[str, list[float]] = {}
        for event in profile.events():
            kind = OPERATORS.get(event.name)
            if kind is not None and not _within(event.cpu_parent):
                seconds = event.device_time_total if gpu else event.cpu_time_total
                found.setdefault(kind, []).append(seconds * 1e-6)
        return found


def _within(event: Any) -> bool:
    """Whether `event` or what it is part of is one of the operators counted."""
    while event is not None:
        if event.name in OPERATORS:
            return True
        event = event.cpu_parent
    return False


OPERATORS: Mapping[str, str] = {
    "aten::mm": "gemm",
    "aten::bmm": "gemm",
    "aten::addmm": "gemm",
    "omnicompile::attention": "attention",
    "omnicompile::attention_backward": "attention",
    "omnicompile::grouped_mm": "grouped_gemm",
    "omnicompile::grouped_mm_weight": "grouped_gemm",
}


def execute(names: list[str], repeats: int, backend: str, say: Callable[[str], None]) -> dict[str, Executed]:
    """Steps of all cases in turns, in this rank: two to warm up, `repeats` that are timed, then memory and profile."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    running: list[Execution] = []
    for name in names:
        start = time.perf_counter()
        running.append(Execution(cases(gpu)[name], device, backend))
        running[-1].step()
        say(f"{name}: first step after {time.perf_counter() - start:.0f} s")
        running[-1].step()
    for repeat in range(repeats):
        turn = repeat % len(running)
        for execution in running[turn:] + running[:turn]:
            execution.timed_step()
    for execution in running:
        execution.measure_peak()
        execution.profile()
    return {execution.case.name: execution.seen for execution in running}


def run_rank(rank: int, world: int, port: int, names: list[str], repeats: int, backend: str, folder: str) -> None:
    """What each spawned process does; rank 0 writes what it measured into `folder`."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    say: Callable[[str], None] = partial(print, file=sys.stderr, flush=True) if rank == 0 else _quiet
    try:
        seen = execute(names, repeats, backend, say)
        if rank == 0:
            text = json.dumps({name: vars(found) for name, found in seen.items()})
            (Path(folder) / "executed.json").write_text(text)
    finally:
        dist.destroy_process_group()


def _quiet(text: str) -> None:
    pass
