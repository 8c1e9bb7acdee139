"""What a calibration measures on a machine: seconds of kernels and collectives, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Machine:
    """device: "cuda" or "cpu". model: of the device, as it names itself. description: for people.
    memory_bytes, context_bytes: of one rank, as in `Hardware`. cores: multiprocessors of a GPU, or threads of one rank
    on a CPU. ranks, ranks_per_node: what took part. facts: date, versions and the like, for the comments of a file."""

    name: str
    model: str
    description: str
    device: str
    memory_bytes: float
    context_bytes: float
    cores: int
    ranks: int
    ranks_per_node: int
    facts: Mapping[str, str]


@dataclass(frozen=True)
class GemmTime:
    """`batch` products (m, k) x (k, n). layout: how the operands lie in memory ("nt" for a linear layer's forward,
    "nn" and "tn" for its gradients)."""

    dtype: str
    m: int
    n: int
    k: int
    batch: int
    layout: str
    seconds: float


@dataclass(frozen=True)
class GroupedTime:
    """One call of the grouped product of our programs: `tokens` rows for each of `experts` matrices (k, n). weight:
    the gradient of the weights."""

    dtype: str
    tokens: int
    n: int
    k: int
    experts: int
    weight: bool
    seconds: float


@dataclass(frozen=True)
class AttentionTime:
    """One call of the attention of our programs over `segments` packed sequences of `length` tokens."""

    dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    segments: int
    length: int
    causal: bool
    backward: bool
    seconds: float


@dataclass(frozen=True)
class MemoryTime:
    """An element-wise kernel or a reduction that reads and writes `nbytes` in all. work: what it does."""

    work: str
    nbytes: int
    seconds: float


@dataclass(frozen=True)
class CollectiveTime:
    """nbytes: as in `collectives.collective_seconds`, of all `tensors` that one call takes."""

    kind: str
    nbytes: int
    ranks: int
    ranks_per_node: int
    tensors: int
    seconds: float


@dataclass(frozen=True)
class Together:
    """Seconds of GEMMs alone, of a collective alone, and of both started together until the GEMMs are done and until
    the collective is."""

    compute: float
    collective: float
    compute_beside: float
    both: float


@dataclass(frozen=True)
class Measurements:
    """launch: seconds of a kernel without work. host_copy: (bytes, seconds) between host and device memory, pinned.
    sustained: rate of GEMMs at the end of some seconds of them, relative to a short burst; None: not measured.
    reduce_copies, gather_copies: as in `CollectiveEfficiency`. notes: what could not be measured."""

    machine: Machine
    launch: float
    gemms: tuple[GemmTime, ...] = ()
    grouped: tuple[GroupedTime, ...] = ()
    attention: tuple[AttentionTime, ...] = ()
    memory: tuple[MemoryTime, ...] = ()
    collectives: tuple[CollectiveTime, ...] = ()
    together: tuple[Together, ...] = ()
    host_copy: tuple[tuple[int, float], ...] = ()
    sustained: float | None = None
    reduce_copies: float = 0.0
    gather_copies: float = 0.0
    notes: tuple[str, ...] = field(default=())

    @property
    def points(self) -> int:
        """Shapes that were timed."""
        groups = (self.gemms, self.grouped, self.attention, self.memory, self.collectives, self.together)
        return sum(len(group) for group in groups)
