"""The Program: a traced model as the planner and the cost model see it.

A Program is an ordered list of *segments*. A segment is a piece of the model that is priced once and executed `count`
times: a repeated layer (all layers of one structure are one segment), or what lies between layers of a block (patch
embedding, projector, token embedding, head with loss). Segments belong to modality *blocks*; tensors flow between them.

Every size is a sympy expression in the workload symbols below, for a micro-batch of one sample before any parallelism,
so that one capture answers every sequence length, micro-batch and layout.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

import networkx as nx
import sympy

from omnicompile.recompute import Recompute

Expr: TypeAlias = sympy.Expr


class Sym:
    """The workload symbols. All count per micro-batch."""

    S = sympy.Symbol("S", positive=True)  # tokens in the language backbone
    N = sympy.Symbol("N", positive=True)  # vision patches over all images
    I = sympy.Symbol("I", positive=True)  # images
    A = sympy.Symbol("A", positive=True)  # audio frames over all clips
    C = sympy.Symbol("C", positive=True)  # audio clips
    B = sympy.Symbol("B", positive=True)  # samples
    S2 = sympy.Symbol("S2", positive=True)  # sum over text segments of length squared
    N2 = sympy.Symbol("N2", positive=True)  # sum over images of patches squared
    A2 = sympy.Symbol("A2", positive=True)  # sum over clips of frames squared


SYMBOLS: tuple[sympy.Symbol, ...] = (Sym.S, Sym.N, Sym.I, Sym.A, Sym.C, Sym.B, Sym.S2, Sym.N2, Sym.A2)


class OpKind(StrEnum):
    GEMM = "gemm"  # dense matrix product, convolution lowered to one
    ATTENTION = "attention"
    GROUPED_GEMM = "grouped_gemm"  # the experts of a mixture-of-experts layer
    MEMORY = "memory"  # a fused chain of element-wise / reduction / copy work, limited by bandwidth


class Phase(StrEnum):
    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True)
class GemmShape:
    """C[m, n] = A[m, k] @ B[k, n], `batch` times. `m` is the dimension that the tokens of the micro-batch run along
    in a forward product; in a weight gradient they run along `k` (see `Op.token_dim`)."""

    m: Expr
    n: Expr
    k: Expr
    batch: Expr = sympy.S.One


@dataclass(frozen=True)
class AttentionShape:
    """heads / kv_heads / head_dim / v_head_dim are integers of the model. `q_tokens`, `kv_tokens`: rows over the whole
    micro-batch. `pairs`: sum over segments of q_len * kv_len, counted without the causal mask."""

    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    q_tokens: Expr
    kv_tokens: Expr
    pairs: Expr
    causal: bool


@dataclass(frozen=True)
class ExpertsShape:
    """A mixture-of-experts product: every token goes to `top_k` of `experts` experts of `weights` matrices each, an
    expert being hidden -> (gate, up) intermediate -> hidden."""

    experts: int
    top_k: int
    hidden: int
    intermediate: int
    tokens: Expr


@dataclass(frozen=True)
class Op:
    """One priced kernel of a segment.

    flops: multiply and add counted separately (a GEMM is 2*m*n*k); attention without the causal discount.
    activation_bytes: bytes of activations read and written. param_bytes: bytes of parameters (or, in the backward, of
    parameter gradients) read or written; these do not shrink when tokens are split over ranks.
    token_dim: "m" or "k", the GEMM dimension that shrinks when tokens are split over ranks; "" if none does.
    feeds: which gradients need this backward op: any of "weight", "input" (both empty for forward ops).
    """

    name: str
    target: str
    kind: OpKind
    phase: Phase
    module: str
    flops: Expr
    activation_bytes: Expr
    param_bytes: Expr
    gemm: GemmShape | None = None
    attention: AttentionShape | None = None
    experts: ExpertsShape | None = None
    token_dim: str = "m"
    feeds: frozenset[str] = frozenset()
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Param:
    """A parameter of one instance of a segment (the first; all instances of a kind have equal shapes)."""

    name: str
    shape: tuple[int, ...]
    expert: bool = False  # the leading dimension is the expert dimension
    tied_to: str = ""  # name of the parameter that this one shares its storage with, if any
    trained: bool = True  # False where the model itself says that it requires no gradient

    @property
    def numel(self) -> int:
        size = 1
        for dim in self.shape:
            size *= dim
        return size


@dataclass(frozen=True)
class Saved:
    """What one instance of a segment keeps from its forward for its backward under one recompute policy.

    nbytes: kept when the segment's parameters are trained. nbytes_frozen: kept when they are frozen and only the
    gradient of the input is needed. recompute_ops: names of forward ops run again in the backward.
    """

    nbytes: Expr
    nbytes_frozen: Expr
    recompute_ops: tuple[str, ...] = ()


@dataclass(frozen=True)
class Held:
    """Bytes of one instance at a moment of its backward. temporaries: beside what was saved or is made again. freed: of
    that, what is no longer needed, not made yet, or never in memory."""

    temporaries: Expr
    freed: Expr


@dataclass(frozen=True)
class BackwardPoint:
    """A moment of a segment's backward at which it may hold the most, as activations or parameters weigh more.

    temporaries, freed: as in `Held`, when nothing is made again. under: by policies that make something again.
    dense / expert: part of the dense and of the expert parameters whose gradients are there.
    """

    temporaries: Expr
    freed: Expr
    dense: float = 1.0
    expert: float = 1.0
    under: dict[Recompute, Held] = field(default_factory=dict)

    def held(self, policy: Recompute) -> Held:
        return self.under.get(policy) or Held(self.temporaries, self.freed)


@dataclass(frozen=True)
class Segment:
    """A piece of the model that is priced once and executed `count` times.

    role: "embed", "layer", "projector", "head" (with the loss) or "other".
    paths: module paths of the instances, in execution order (one empty path for what lies outside repeated layers).
    input_bytes: activations that flow in and carry a gradient. output_bytes: those that flow out.
    forward_peak: temporaries of one instance beyond its inputs and what is saved. backward: moments of its backward in
    order, one at least.
    logits: (tokens, vocabulary) of the largest head output, for a head segment.
    """

    name: str
    block: str
    role: str
    count: int
    paths: tuple[str, ...]
    params: tuple[Param, ...]
    ops: tuple[Op, ...]
    saved: dict[Recompute, Saved]
    input_bytes: Expr
    output_bytes: Expr
    forward_peak: Expr
    backward: tuple[BackwardPoint, ...]
    logits: tuple[Expr, int] | None = None

    @property
    def param_count(self) -> int:
        """Parameters of one instance, those shared with another segment counted where they are defined."""
        return sum(p.numel for p in self.params if not p.tied_to)

    @property
    def expert_param_count(self) -> int:
        return sum(p.numel for p in self.params if p.expert and not p.tied_to)

    @property
    def trains(self) -> bool:
        """Whether any of its parameters is trained, as far as the model itself says."""
        return any(p.trained for p in self.params)

    def phase_ops(self, phase: Phase) -> tuple[Op, ...]:
        return tuple(op for op in self.ops if op.phase == phase)

    def attention_ops(self, phase: Phase = Phase.FORWARD) -> tuple[AttentionShape, ...]:
        return tuple(op.attention for op in self.phase_ops(phase) if op.attention is not None)


@dataclass(frozen=True)
class Block:
    """A modality block: "text", "vision", "audio", "video", "generation" or a name made from the module path.

    kind: "backbone" (holds the loss), "encoder" (feeds the backbone) or "decoder" (is fed by it).
    units: the symbol that counts the block's work items, which "images split over SP ranks" deals out (I or C).
    """

    name: str
    kind: str
    path: str
    segments: tuple[str, ...]
    units: str = ""


@dataclass(frozen=True)
class Edge:
    """Activations of `nbytes` that flow from one block to another in a micro-batch."""

    source: str
    target: str
    nbytes: Expr


@dataclass(frozen=True)
class Run:
    """`count` executions of the segment `segment` in a row. The order of runs is the order of the model's forward."""

    segment: str
    count: int


@dataclass(frozen=True)
class SampleShape:
    """How a Workload turns into values of the symbols for this model (one sample).

    tokens_per_image / tokens_per_clip: placeholders in the text sequence. patches_per_image: None for models whose
    vision tower takes images of a fixed size. Fixed sequence lengths (a decoder of at most 448 tokens, say) clip
    `seq_len` to `max_seq_len`.
    """

    patches_per_image: int = 0
    tokens_per_image: int = 0
    frames_per_clip: int = 0
    tokens_per_clip: int = 0
    images: int = 0
    clips: int = 0
    seq_len: int = 0


@dataclass(frozen=True)
class Program:
    """The traced model. `sample` holds the symbols' values for the workload that it was captured for."""

    name: str
    source: str
    blocks: tuple[Block, ...]
    segments: tuple[Segment, ...]
    runs: tuple[Run, ...]
    edges: tuple[Edge, ...]
    sample: SampleShape
    dtype: str = "bfloat16"
    digest: str = ""
    notes: tuple[str, ...] = ()

    def segment(self, name: str) -> Segment:
        return next(s for s in self.segments if s.name == name)

    def block(self, name: str) -> Block:
        return next(b for b in self.blocks if b.name == name)

    def block_segments(self, name: str) -> tuple[Segment, ...]:
        return tuple(s for s in self.segments if s.block == name)

    @property
    def param_count(self) -> int:
        return sum(s.param_count * s.count for s in self.segments)

    @property
    def has_experts(self) -> bool:
        return any(s.expert_param_count for s in self.segments)

    def dataflow(self) -> nx.DiGraph:
        """Blocks as nodes and `Edge`s as edges (attribute `nbytes`)."""
        graph = nx.DiGraph()
        graph.add_nodes_from(b.name for b in self.blocks)
        for edge in self.edges:
            graph.add_edge(edge.source, edge.target, nbytes=edge.nbytes)
        return graph

    def symbol_values(self, micro_batch: int = 1, seq_len: int | None = None) -> dict[sympy.Symbol, float]:
        """Values of the symbols for a micro-batch of `micro_batch` packed samples of `seq_len` tokens."""
        sample = self.sample
        tokens = sample.seq_len if seq_len is None else seq_len
        images, clips = sample.images * micro_batch, sample.clips * micro_batch
        return {
            Sym.S: tokens * micro_batch,
            Sym.N: images * sample.patches_per_image,
            Sym.I: images,
            Sym.A: clips * sample.frames_per_clip,
            Sym.C: clips,
            Sym.B: micro_batch,
            Sym.S2: tokens**2 * micro_batch,
            Sym.N2: images * sample.patches_per_image**2,
            Sym.A2: clips * sample.frames_per_clip**2,
        }
