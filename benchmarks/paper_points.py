"""Predictions for the figures of `paper_figures.py`: which points there are, how each is planned, what is checked."""

from __future__ import annotations

import csv
import itertools
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from omnicompile.capture.api import capture_program
from omnicompile.capture.source import ModelSource, load_model_source
from omnicompile.cluster import Cluster
from omnicompile.cost_model.hardware import load_hardware
from omnicompile.cost_model.step_model import StepModel
from omnicompile.errors import InfeasibleError, OmniCompileError, PlanError
from omnicompile.plan import Plan
from omnicompile.planner.api import PlanResult, max_seq_len, plan_program
from omnicompile.planner.predict import simulate
from omnicompile.program import Program
from omnicompile.workload import Workload

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
K, GIB = 1024, 2.0**30
OVERHEAD = ("context", "allocator slack")
KINDS = ("paper", "logits", "best", "priced")
"""Plans: the paper's choices; the same with whole logits; our best; our best if what is priced and cannot be executed
yet were there, above all offloading to host memory."""
BY_LENGTH = ("paper", "best")
"""What is predicted at every length; the others only for the longest sequence."""
HOST_TB = 2.0
"""Host memory of a usual node. Offloading more than that is reported as a failed check."""


@dataclass(frozen=True)
class Figure:
    """One figure: a model on a cluster, over SP, EP and sequence lengths. stated: what the paper says of it."""

    name: str
    title: str
    model: str
    gpus: int
    sps: tuple[int, ...]
    eps: tuple[int, ...]
    lengths: tuple[int, ...]
    stated: str
    stated_length: int = 0
    stated_mfu: float = 0.0
    stated_speed: float = 0.0
    remark: str = ""


FIGURES = (
    Figure(
        "fig4", "Figure 4: Qwen2-VL-7B on 8 GPUs", "examples/qwen2_vl_7b.py", 8, (1, 2, 4), (1,),
        tuple(K * n for n in (8, 16, 32, 64, 96, 128, 160, 192, 224, 256)),
        "SP 1, 2, 4, lengths 8K to 256K; up to 192K tokens at 61.5% MFU (SP of that point not stated)",
        192 * K, stated_mfu=0.615,
    ),
    Figure(
        "fig5", "Figure 5: Qwen2-VL-72B on 128 GPUs", "examples/qwen2_vl_72b.py", 128, (1, 2, 4, 8), (1,),
        tuple(K * n for n in (8, 16, 32, 64, 96, 128, 192, 256)),
        "SP 1, 2, 4, 8, lengths 8K to 96K; up to 96K tokens at 54.82% MFU (SP of that point not stated)",
        96 * K, stated_mfu=0.5482,
    ),
    Figure(
        "fig6a", "Figure 6a: 30B-A3B omni mixture of experts on 128 GPUs", "benchmarks/models/omni_moe_30b_a3b.py",
        128, (1, 2, 4), (1, 2, 4, 8), tuple(K * n for n in (16, 32, 64, 96, 128, 160, 192)),
        "SP 1, 2, 4 with EP 1, 2, 4, lengths 16K to 192K; up to 160K tokens, and over 2,800 tokens/s/GPU "
        "(SP, EP and length of that point not stated)",
        160 * K, stated_speed=2800.0,
        remark=" (Qwen3-30B-A3B with the vision and audio encoders of Qwen2.5-Omni; without the paper's image decoder)",
    ),
)  # fmt: skip


@dataclass
class Point:
    """One prediction. speed in tokens/s/GPU; memory in GiB per GPU, of which `allocated` without the CUDA context and
    the allocator's slack; host: TB of host memory per node that offloading takes; time: seconds of the step by kind."""

    sp: int
    ep: int
    seq_len: int
    plan: str
    fits: bool
    speed: float = 0.0
    mfu: float = 0.0
    mfu_paper: float = 0.0
    memory: float = 0.0
    allocated: float = 0.0
    host: float = 0.0
    seconds: float = 0.0
    choices: str = ""
    memory_by_kind: dict[str, float] = field(default_factory=dict)
    time_by_kind: dict[str, float] = field(default_factory=dict)
    error: str = ""


@dataclass
class Longest:
    """The longest sample that fits, in tokens (0: none); and what our prediction is there."""

    sp: int
    ep: int
    plan: str
    seq_len: int
    at: Point | None = None


@dataclass
class Result:
    figure: Figure
    workload: str
    points: list[Point] = field(default_factory=list)
    longest: list[Longest] = field(default_factory=list)
    older_attention: list[Point] = field(default_factory=list)
    implied_speed: float = 0.0
    checks: list[str] = field(default_factory=list)


def quick(figure: Figure) -> Figure:
    return replace(figure, sps=figure.sps[-1:], eps=figure.eps[-1:], lengths=figure.lengths[:1])


def figure_result(figure: Figure) -> Result:
    source = load_model_source(str(ROOT / figure.model))
    result = Result(figure, _workload_text(source, figure))
    for sp in figure.sps:
        for ep in figure.eps:
            for kind in KINDS:
                started = time.perf_counter()
                _line(result, source, sp, ep, kind)
                seconds = time.perf_counter() - started
                print(f"{figure.name} sp={sp} ep={ep} {kind}: {seconds:.1f} s", file=sys.stderr, flush=True)
    result.older_attention = _older_attention(result, source)
    result.implied_speed = _implied_speed(result)
    result.checks = checks(result)
    return result


def _line(result: Result, source: ModelSource, sp: int, ep: int, kind: str) -> None:
    """All lengths of one SP, EP and kind of plan."""
    figure = result.figure
    workload = _workload(figure.gpus // sp, figure.lengths[0])
    cluster = Cluster(figure.gpus)
    pins = pins_of(source, workload, sp, ep, kind)
    try:
        found = max_seq_len(source, cluster, workload, pins)
        limit = found.plans[0].workload.seq_len
        result.longest.append(Longest(sp, ep, kind, limit, _best_point(found, kind)))
    except InfeasibleError:
        limit = 0
        result.longest.append(Longest(sp, ep, kind, 0))
    except PlanError as error:
        lengths = figure.lengths if kind in BY_LENGTH else ()
        result.points += [Point(sp, ep, n, kind, False, error=str(error)) for n in lengths]
        return
    for seq_len in figure.lengths if kind in BY_LENGTH else ():
        if seq_len > limit:
            result.points.append(Point(sp, ep, seq_len, kind, False))
            continue
        result.points.append(_planned(source, cluster, replace(workload, seq_len=seq_len), pins, kind, sp, ep))


def _planned(
    source: ModelSource, cluster: Cluster, workload: Workload, pins: dict[str, str], kind: str, sp: int, ep: int
) -> Point:
    try:
        program = capture_program(source, workload)
        return _best_point(plan_program(program, cluster, workload, pins, name=source.spec), kind)
    except OmniCompileError as error:
        return Point(sp, ep, workload.seq_len, kind, False, error=str(error).splitlines()[0])


def _workload(global_batch: int, seq_len: int) -> Workload:
    """One micro-batch of one sample per SP group; two images of 896 x 896, 30 s of audio where a model takes them."""
    return Workload(seq_len=seq_len, global_batch=global_batch, freeze=("encoders",))


def pins_of(source: ModelSource, workload: Workload, sp: int, ep: int, kind: str) -> dict[str, str]:
    pins = {"mesh.sp": str(sp), "mesh.ep": str(ep)}
    if kind in ("best", "priced"):
        return pins | ({"priced": "true"} if kind == "priced" else {})
    program = capture_program(source, workload)
    for block in program.blocks:
        if block.kind != "encoder":
            pins |= {f"{block.name}.recompute": "full", f"{block.name}.offload": "false"}
        pins[f"{block.name}.sharding"] = "fsdp"
    pins |= {"offload_optimizer": "false", "micro_batch": "1", "mesh.dp_replicate": "1"}
    return pins | {"loss_head": "full" if kind == "logits" else "chunked"}


def _best_point(result: PlanResult, kind: str) -> Point:
    plan = result.plans[0]
    return _point(plan, kind, StepModel(result.program, plan.cluster))


def _point(plan: Plan, kind: str, model: StepModel) -> Point:
    prediction = plan.prediction
    assert prediction is not None
    memory = {name: round(value / GIB, 3) for name, value in prediction.memory.items()}
    return Point(
        sp=plan.mesh.sp,
        ep=plan.mesh.ep,
        seq_len=plan.workload.seq_len,
        plan=kind,
        fits=prediction.fits,
        speed=prediction.tokens_per_second_per_gpu,
        mfu=prediction.mfu,
        mfu_paper=prediction.mfu_paper,
        memory=prediction.memory_total / GIB,
        allocated=sum(value for name, value in memory.items() if name not in OVERHEAD),
        host=host_bytes(plan, model) * plan.cluster.gpus_per_node / 1e12,
        seconds=prediction.step_seconds,
        choices=choices(plan),
        memory_by_kind=memory,
        time_by_kind={name: round(value, 6) for name, value in prediction.time.items()},
    )


def host_bytes(plan: Plan, model: StepModel) -> float:
    """Bytes of host memory per GPU: offloaded activations of a micro-batch, offloaded master weights and moments."""
    total = 0.0
    for cost in model.plan_blocks(plan).values():
        total += 12 * cost.weights.static.trained_numel if plan.offload_optimizer else 0.0
        for name, unit in cost.work.units.items():
            total += unit.host * model.program.segment(name).count
    return total


def simulated(plan: Plan, program: Program, gpu: str, attention: str, kind: str) -> Point:
    """The same plan on another GPU, or with another attention kernel."""
    cluster = replace(plan.cluster, gpu=gpu)
    model = StepModel(program, cluster, load_hardware(gpu).with_attention_kernel(attention))
    return _point(simulate(program, replace(plan, cluster=cluster), model), kind, model)


def choices(plan: Plan) -> str:
    """What a plan chose, in a few words."""
    parts = [f"replicas {plan.mesh.dp_replicate}"] if plan.mesh.dp_replicate > 1 else []
    for name, block in plan.blocks.items():
        words = [str(block.sharding), *([] if block.layout == "batch" else [str(block.layout)])]
        if not block.frozen:
            words += [f"recompute {block.recompute}", *(["offload"] if block.offload else [])]
        parts.append(f"{name} {' '.join(words)}")
    parts.append(f"{plan.loss_head} loss")
    return "; ".join([*parts, *(["optimizer offloaded"] if plan.offload_optimizer else [])])


def _older_attention(result: Result, source: ModelSource) -> list[Point]:
    """The paper's choices at the stated length with FlashAttention-2 in place of 3, for every SP and EP that fits."""
    figure = result.figure
    points = []
    for point in result.points:
        if point.plan == "paper" and point.fits and point.seq_len == figure.stated_length:
            workload = _workload(figure.gpus // point.sp, point.seq_len)
            pins = pins_of(source, workload, point.sp, point.ep, "paper")
            program = capture_program(source, workload)
            plan = plan_program(program, Cluster(figure.gpus), workload, pins).plans[0]
            points.append(simulated(plan, program, "h100", "fa2", "FlashAttention-2"))
    return points


def _implied_speed(result: Result) -> float:
    """Tokens/s/GPU at which the stated MFU is reached at the stated length, by VeOmni's counting; 0 if unknown."""
    figure = result.figure
    there = [p for p in result.points if p.fits and p.seq_len == figure.stated_length]
    return figure.stated_mfu * there[0].speed / there[0].mfu_paper if there else 0.0


def checks(result: Result) -> list[str]:
    """What cannot be right in a set of predictions, whatever the hardware."""
    found = []
    by_key = {(p.sp, p.ep, p.seq_len, p.plan): p for p in result.points if p.fits}
    for (sp, ep, seq_len, kind), point in by_key.items():
        where = f"SP {sp}, EP {ep}, {seq_len // K}K"
        best = by_key.get((sp, ep, seq_len, "best"))
        if kind == "paper" and (best is None or best.speed < point.speed * (1 - 1e-9)):
            found.append(f"{where}: the best plan is not as fast as the one with the paper's choices")
        if not 0 < point.mfu < 0.8:
            found.append(f"{where} {kind}: MFU {point.mfu:.1%}")
    for entry in result.longest:
        if entry.at is not None and entry.at.host > HOST_TB:
            found.append(
                f"SP {entry.sp}, EP {entry.ep} {entry.plan}: the longest sequence takes {entry.at.host:.1f} TB of host "
                "memory per node"
            )
    for kind in KINDS:
        for sp in result.figure.sps:
            for ep in result.figure.eps:
                line = [p for (s, e, _, k), p in by_key.items() if (s, e, k) == (sp, ep, kind)]
                found += [
                    f"SP {sp}, EP {ep}: {b.seq_len // K}K needs less memory than {a.seq_len // K}K"
                    for a, b in itertools.pairwise(line)
                    if kind == "paper" and b.memory < a.memory
                ]
        for ep in result.figure.eps:
            limits = [entry.seq_len for entry in result.longest if (entry.plan, entry.ep) == (kind, ep)]
            if limits != sorted(limits):
                found.append(f"EP {ep} {kind}: the longest sequence does not grow with SP: {limits}")
    return found


VEOMNI_MODEL, VEOMNI_GPUS = "benchmarks/models/dense_72b.py", 128


@dataclass(frozen=True)
class Unstated:
    """What VeOmni's figure does not say: GPU, number of GPUs, attention kernel. The first is what is compared."""

    gpu: str
    gpus: int
    attention: str


ASSUMED = Unstated("h100", VEOMNI_GPUS, "fa3")
# Chosen after seeing the errors with ASSUMED, to see what could explain them: not to be read as a better prediction.
OTHERS = (
    Unstated("h100", VEOMNI_GPUS, "fa2"), Unstated("h800", VEOMNI_GPUS, "fa3"), Unstated("h800", VEOMNI_GPUS, "fa2"),
    Unstated("h100", 32, "fa3"), Unstated("h800", 32, "fa2"),
)  # fmt: skip


def veomni_points(only_first: bool = False) -> list[dict[str, Any]]:
    """The nine points of VeOmni's own system, beside our prediction with the paper's choices."""
    with (HERE / "data" / "runs.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["source"] == "VeOmni README performance figure: VeOmni"]
    source = load_model_source(str(ROOT / VEOMNI_MODEL))
    points = []
    for row in rows[: 1 if only_first else None]:
        sp, seq_len = int(row["cp_or_sp"]), int(row["seq_len"])
        predicted = {unstated: _veomni_point(source, sp, seq_len, unstated) for unstated in (ASSUMED, *OTHERS)}
        workload = Workload(seq_len=seq_len, global_batch=VEOMNI_GPUS // sp)
        pins = pins_of(source, workload, sp, 1, "best")
        best = _planned(source, Cluster(VEOMNI_GPUS), workload, pins, "best", sp, 1)
        point = _compared(row, predicted[ASSUMED], best)
        others = [asdict(u) | _errors(row, predicted[u]) for u in OTHERS]
        points.append(point | {"with_other_assumptions": others})
        print(row["id"], file=sys.stderr, flush=True)
    return points


def _veomni_point(source: ModelSource, sp: int, seq_len: int, unstated: Unstated) -> Point:
    workload = Workload(seq_len=seq_len, global_batch=unstated.gpus // sp)
    pins = pins_of(source, workload, sp, 1, "paper")
    program = capture_program(source, workload)
    try:
        plan = plan_program(program, Cluster(unstated.gpus), workload, pins, name=source.spec).plans[0]
        return simulated(plan, program, unstated.gpu, unstated.attention, "paper")
    except OmniCompileError as error:
        return Point(sp, 1, seq_len, "paper", False, error=str(error).splitlines()[0])


def _errors(row: dict[str, str], point: Point) -> dict[str, float]:
    speed, memory = float(row["tokens_per_s_per_gpu"]), float(row["peak_mem_gib"])
    if not point.fits:
        return {}
    return {
        "speed_error": point.speed / speed - 1,
        "allocated_error": point.allocated / memory - 1,
        "memory_error": point.memory / memory - 1,
    }


def _compared(row: dict[str, str], paper: Point, best: Point) -> dict[str, Any]:
    return {
        "id": row["id"], "sp": int(row["cp_or_sp"]), "seq_len": int(row["seq_len"]),
        "speed": float(row["tokens_per_s_per_gpu"]), "mfu_printed": float(row["mfu_pct"]) / 100,
        "memory_printed": float(row["peak_mem_gib"]), **_errors(row, paper),
        "paper": asdict(paper), "best": asdict(best),
    }  # fmt: skip


def _workload_text(source: ModelSource, figure: Figure) -> str:
    sample = capture_program(source, _workload(figure.gpus, figure.lengths[0])).sample
    parts = [f"{sample.images} images of {sample.patches_per_image} patches ({sample.tokens_per_image} tokens)"]
    if sample.clips:
        parts.append(f"{sample.clips} audio clip of {sample.frames_per_clip} frames ({sample.tokens_per_clip} tokens)")
    return " and ".join(parts) + " per sample, whatever its length"
