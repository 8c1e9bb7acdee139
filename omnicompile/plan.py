"""The Plan: mesh degrees, one choice per modality block, and what they are predicted to give. A Plan is data."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from omnicompile.cluster import Cluster
from omnicompile.recompute import Recompute
from omnicompile.workload import Workload


class Sharding(StrEnum):
    """Where a block's parameters, gradients and optimizer state live."""

    REPLICATE = "replicate"  # whole on every rank; gradients all-reduced
    ZERO1 = "zero1"  # as replicate, but the optimizer's state is sharded (ZeRO-1); priced, not executable
    HSDP = "hsdp"  # sharded over dp_shard x sp, replicated over dp_replicate
    FSDP = "fsdp"  # sharded over all data ranks: dp_replicate x dp_shard x sp


class Layout(StrEnum):
    """How the activations of a block are laid out over the `sp` ranks that share one micro-batch."""

    BATCH = "batch"  # sp = 1: every rank has its own micro-batch
    REPLICATED = "replicated"  # every SP rank computes the whole block
    SEQUENCE = "sequence"  # tokens split over SP ranks, all-to-all around attention (Ulysses)
    IMAGES = "images"  # whole images (or audio clips) dealt out to SP ranks


class LossHead(StrEnum):
    FULL = "full"  # logits of the whole micro-batch at once
    CHUNKED = "chunked"  # linear and cross-entropy fused, a chunk of tokens at a time


@dataclass(frozen=True)
class Mesh:
    """The global mesh; ranks are numbered with `tp` fastest, then `cp`, `sp`, `dp_shard`, `dp_replicate`, `pp`.

    `ep` is folded out of dp_shard x sp (with tp or cp: of all ranks of a pipeline stage): expert groups are
    consecutive ranks. tp, cp (ring) and pp are priced and not yet executable.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    sp: int = 1
    ep: int = 1
    tp: int = 1
    cp: int = 1
    pp: int = 1

    @property
    def world(self) -> int:
        return self.dp_replicate * self.dp_shard * self.sp * self.tp * self.cp * self.pp

    @property
    def data_ranks(self) -> int:
        """Groups of ranks that work on different micro-batches."""
        return self.dp_replicate * self.dp_shard


@dataclass(frozen=True)
class BlockPlan:
    """The choices for one modality block; every layer of a kind shares them.

    sp / ep: 1, or the mesh degree. reshard: free gathered parameters after the forward and gather them again in the
    backward. offload: keep saved activations in host memory between forward and backward.
    """

    sharding: Sharding = Sharding.FSDP
    layout: Layout = Layout.BATCH
    sp: int = 1
    ep: int = 1
    recompute: Recompute = Recompute.NONE
    offload: bool = False
    reshard: bool = True
    frozen: bool = False


@dataclass(frozen=True)
class Stack:
    """How a software stack runs a step, where it may differ from ours. All of it is priced; only the defaults run.

    pipeline_chunks: model chunks per rank of an interleaved pipeline (1F1B; 1: not interleaved).
    gemm_dtype: of linear layers ("float8", "float8_rowwise" with a scale per row; "": the compute dtype).
    attention_kernel: as the hardware file names them, or "unfused" (two GEMMs and a softmax, scores kept); "": the
    hardware file's own.
    compiled: element-wise work fused as Inductor does, otherwise kernel by kernel.
    tp_sequence: beside tp, activations between linear layers are cut along the sequence. tp_overlap: collectives of tp
    run in pieces beside their GEMMs. tp_async: the sum of an input gradient runs beside the weight gradient.
    expert_tp: ranks that share an expert. dedup_dispatch: a token goes to each node and rank of its experts once
    (DeepEP), not once per expert.
    overlap_gradients: sums over replicas (and ZeRO-1's parameter gathers) run beside the backward (forward).
    broadcast_updates: the optimizer's state is dealt out as whole tensors (InternEvo): gradients are summed by an
    all-reduce, and every rank broadcasts the parameters that it updated.
    fused_loss: of a whole loss head, only logits and their gradient exist, in 16 bit; otherwise float32 copies of both
    besides. fused_kernels: norms, activations and rotary embeddings are kernels that keep no more than their input and
    the input of the product after them (Transformer Engine, Liger); otherwise all that the backward reads is kept.
    host_bound: operators are launched one by one from Python, so that a layer takes at least the host's time for them.
    recompute_whole: under `full` a layer runs whole again, its last product too. recompute_attention: attention runs
    again in the backward. recompute_share: share of a block's layers that its recompute policy is for.
    master_dtype: of master weights; moment_dtype: of each of AdamW's two moments.
    """

    pipeline_chunks: int = 1
    gemm_dtype: str = ""
    attention_kernel: str = ""
    compiled: bool = True
    tp_sequence: bool = True
    tp_overlap: bool = False
    tp_async: bool = True
    expert_tp: int = 1
    overlap_gradients: bool = False
    broadcast_updates: bool = False
    dedup_dispatch: bool = False
    fused_loss: bool = True
    fused_kernels: bool = False
    host_bound: bool = False
    recompute_whole: bool = False
    recompute_attention: bool = False
    recompute_share: float = 1.0
    master_dtype: str = "float32"
    moment_dtype: str = "float32"


@dataclass(frozen=True)
class Overlap:
    """What is done so that communication runs beside compute; all of it is executed.

    exchanges: all-to-alls of sequence and expert parallelism are launched as soon as their input is there and waited
    for where their result is needed. head_groups: attention runs in so many groups of heads, each exchanged while the
    next computes. expert_chunks: experts of a rank run in so many chunks, whose rows travel while others compute.
    prefetch: units (layers) ahead of use at which parameters are gathered. replica_sums: sums of gradients over
    replicas run inside the backward of a step without accumulation.
    """

    exchanges: bool = True
    head_groups: int = 1
    expert_chunks: int = 1
    prefetch: int = 1
    replica_sums: bool = False


OURS = Stack()
"""The stack that `parallelize` runs."""


@dataclass(frozen=True)
class Prediction:
    """What the cost model says of a plan.

    step_seconds: one optimizer step. time: seconds of the step by kind ("compute", "recompute", "optimizer",
    "exposed all_gather", "hidden all_gather", ...). memory: bytes per GPU by kind ("parameters", "gradients",
    "optimizer", "activations", "temporaries", "gathered parameters", "buffers", "context"). block_memory and
    block_time: per block, bytes and compute seconds (of a pipeline: bytes on its fullest stage, seconds on the stage
    that has most of the block). mfu: causal attention counted as half, recompute not counted.
    mfu_paper: attention counted without the causal mask, 6 FLOPs per active parameter and token (VeOmni's counting).
    """

    step_seconds: float
    tokens_per_second_per_gpu: float
    mfu: float
    mfu_paper: float
    memory: dict[str, float]
    memory_capacity: float
    time: dict[str, float]
    block_memory: dict[str, float] = field(default_factory=dict)
    block_time: dict[str, float] = field(default_factory=dict)

    @property
    def memory_total(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.memory_total <= self.memory_capacity


@dataclass(frozen=True)
class Plan:
    """A way to run `model` on `cluster`: what a recipe file holds.

    model: what was planned, as the user named it (a path or an import name). micro_batch: samples per rank group and
    micro-step. accumulation: micro-steps per optimizer step. offload_optimizer: optimizer state in host memory.
    param_dtype is the compute dtype; master weights are float32. notes: for the reader.
    """

    model: str
    cluster: Cluster
    workload: Workload
    mesh: Mesh
    blocks: dict[str, BlockPlan]
    micro_batch: int = 1
    accumulation: int = 1
    loss_head: LossHead = LossHead.FULL
    offload_optimizer: bool = False
    param_dtype: str = "bfloat16"
    reduce_dtype: str = "float32"
    stack: Stack = OURS
    overlap: Overlap = Overlap()
    prediction: Prediction | None = None
    notes: tuple[str, ...] = ()

    @property
    def global_batch(self) -> int:
        """Samples per optimizer step."""
        return self.micro_batch * self.accumulation * self.mesh.data_ranks

    def save(self, path: str | Path) -> None:
        """Write the plan as a recipe (YAML)."""
        from omnicompile.recipe import save_recipe

        save_recipe(self, path)

    def __str__(self) -> str:
        from omnicompile.report.terminal import plan_text

        return plan_text(self)
