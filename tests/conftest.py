"""A small program and plans for it, for tests of what shows or stores them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import sympy

from omnicompile.cluster import Cluster
from omnicompile.plan import BlockPlan, Layout, LossHead, Mesh, Plan, Prediction, Sharding
from omnicompile.program import (
    BackwardPoint,
    Block,
    Edge,
    ExpertsShape,
    Op,
    OpKind,
    Param,
    Phase,
    Program,
    Run,
    SampleShape,
    Saved,
    Segment,
    Sym,
)
from omnicompile.recompute import Recompute
from omnicompile.workload import Workload

GIB = 2**30


def _op(name: str, phase: Phase, flops: sympy.Expr, experts: ExpertsShape | None = None) -> Op:
    kind = OpKind.GEMM if experts is None else OpKind.GROUPED_GEMM
    return Op(name, "aten.mm", kind, phase, "layers.0", flops, Sym.S, sympy.Integer(0), experts=experts)


def _segment(name: str, block: str, tokens: sympy.Symbol, count: int, experts: bool = False) -> Segment:
    shape = ExpertsShape(4, 1, 8, 8, tokens) if experts else None
    params = (Param("weight", (10, 100)), *((Param("experts", (4, 100), expert=True),) if experts else ()))
    saved = {policy: Saved(size * tokens, tokens) for policy, size in zip(Recompute, (6, 4, 3, 2))}
    return Segment(
        name=name,
        block=block,
        role="layer",
        count=count,
        paths=tuple(f"{name}.{index}" for index in range(count)),
        params=params,
        ops=(_op("mm", Phase.FORWARD, 2000 * tokens, shape), _op("mm_b", Phase.BACKWARD, 4000 * tokens)),
        saved=saved,
        input_bytes=2 * tokens,
        output_bytes=2 * tokens,
        forward_peak=tokens,
        backward=(BackwardPoint(tokens, sympy.Integer(0)),),
    )


@pytest.fixture
def sample_program() -> Program:
    """1,000 parameters a layer: 2 vision layers, 3 text layers with 400 more in 4 experts, of which a token uses 1."""
    return Program(
        name="Sample",
        source="model.py",
        blocks=(
            Block("vision", "encoder", "model.visual", ("vision.layers",), "I"),
            Block("text", "backbone", "model.language", ("text.layers",)),
        ),
        segments=(_segment("vision.layers", "vision", Sym.N, 2), _segment("text.layers", "text", Sym.S, 3, True)),
        runs=(Run("vision.layers", 2), Run("text.layers", 3)),
        edges=(Edge("vision", "text", 8 * Sym.I),),
        sample=SampleShape(patches_per_image=64, tokens_per_image=16, images=2, seq_len=1000),
        notes=("a note on the [program]",),
    )


@pytest.fixture
def sample_plans() -> list[Plan]:
    """The best plan for `sample_program` on 16 GPUs, and two that are slower."""
    memory = {"parameters": 4.0 * GIB, "activations": 21.0 * GIB, "context": 1.6 * GIB}
    time = {"compute": 9.8, "optimizer": 0.05, "exposed all_gather": 0.95, "hidden all_gather": 3.3}
    prediction = Prediction(
        step_seconds=10.8,
        tokens_per_second_per_gpu=500.0,
        mfu=0.451,
        mfu_paper=0.548,
        memory=memory,
        memory_capacity=80.0 * GIB,
        time=time,
        block_memory={"vision": 1.5 * GIB, "text": 20 * GIB},
        block_time={"vision": 0.8, "text": 9.0},
    )
    best = Plan(
        model="model.py",
        cluster=Cluster(16, price_per_gpu_hour=2.5),
        workload=Workload(seq_len=1000, images=2, freeze=("vision",)),
        mesh=Mesh(dp_shard=4, sp=4, ep=2),
        blocks={
            "vision": BlockPlan(sharding=Sharding.REPLICATE, layout=Layout.IMAGES, sp=4, frozen=True),
            "text": BlockPlan(layout=Layout.SEQUENCE, sp=4, ep=2, recompute=Recompute.SELECTIVE),
        },
        accumulation=2,
        loss_head=LossHead.CHUNKED,
        prediction=prediction,
        notes=("limited by memory: activations of [text]",),
    )
    slower = replace(
        best, mesh=Mesh(dp_shard=2, sp=8, ep=2), prediction=replace(prediction, tokens_per_second_per_gpu=450.0)
    )
    other = dict(best.blocks) | {"vision": replace(best.blocks["vision"], layout=Layout.REPLICATED)}
    slowest = replace(best, blocks=other, prediction=replace(prediction, tokens_per_second_per_gpu=400.0))
    return [best, slower, slowest]


@pytest.fixture(autouse=True, scope="module")
def _no_group_is_left() -> Iterator[None]:
    """A proof runs all ranks in one process and leaves their fake group behind: the next file begins without."""
    yield
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized() and dist.get_backend() == "fake":
        dist.destroy_process_group()
