"""From rows of published runs to what is priced: `specs_of` gives a `RunSpec` or a `Skipped` for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from published_layouts import RunLayout, layout_of
from published_machines import machine_of, networks
from published_models import Model, model_of
from published_rows import Row, SkipRow

from omnicompile.cost_model.hardware import Hardware

WEAK = (
    (r"natural routing", "routing of experts not balanced"),
    (r"not tuned|not well tuned|treat with suspicion|biased slow", "doubtful by the notes"),
)
"""Notes that say that a measurement is no target: such rows are priced and left out of the totals."""
GIB = 2.0**30


@dataclass(frozen=True)
class RunSpec:
    """One published run, ready to be priced.

    seconds: measured, of one optimizer step; None for rows of memory alone. seconds_from: the columns it comes from.
    memory: measured peak bytes of a GPU (or None); memory_kind: "allocated" by tensors, "reserved" by the
    allocator, or all of the "device".
    Values of `peak_mem_gib` are taken as GiB, also where the source labelled them GB (7% less if it meant 1e9).
    weak: why the row does not count in totals, or "". assumed: what the row leaves open.
    """

    id: str
    suite: str
    model: Model
    gpu: str
    hardware: Hardware
    gpus: int
    gpus_per_node: int
    seq_len: int
    global_batch: int
    layout: RunLayout
    seconds: float | None
    seconds_from: str
    memory: float | None
    memory_kind: str
    weak: str
    gpu_text: str

    @property
    def modern(self) -> bool:
        return self.layout.modern

    @property
    def assumed(self) -> tuple[str, ...]:
        return self.layout.assumed


@dataclass(frozen=True)
class Skipped:
    id: str
    suite: str
    reason: str


def specs_of(rows: Sequence[Row]) -> tuple[list[RunSpec], list[Skipped]]:
    """What can be predicted of the rows, and why the others cannot."""
    stated = networks(list(rows))
    specs: list[RunSpec] = []
    skipped: list[Skipped] = []
    for row in rows:
        try:
            specs.append(spec_of(row, stated.get((row.suite, row["gpu"]))))
        except SkipRow as reason:
            skipped.append(Skipped(row.id, row.suite, str(reason)))
    return specs, skipped


def spec_of(row: Row, network: float | None = None) -> RunSpec:
    """network: bytes/s of a GPU between nodes where the row states none. Raises SkipRow."""
    model = model_of(row)
    hardware, gpu = machine_of(row, network)
    layout = layout_of(row, bool(model.size("experts")), hardware)
    gpus, seq_len = layout.gpus, row.needed("seq_len")
    per_node = row.whole("gpus_per_node") or 8
    if gpus > per_node and gpus % per_node:
        raise SkipRow("the GPUs are not whole nodes")
    samples = layout.micro_batch * layout.accumulation * layout.data_ranks
    seconds, origin = measured_seconds(row, gpus, samples * seq_len, model, seq_len, hardware)
    memory = row.number("peak_mem_gib")
    if seconds is None and memory is None:
        raise SkipRow("neither step time, tokens/s nor memory stated")
    weak = next((reason for pattern, reason in WEAK if row.mentions(pattern)), layout.weak)
    return RunSpec(
        row.id, row.suite, model, gpu, hardware, gpus, min(per_node, gpus), seq_len, samples, layout, seconds, origin,
        memory * GIB if memory else None, memory_kind(row), weak, row["gpu"],
    )  # fmt: skip


def measured_seconds(
    row: Row, gpus: int, tokens: int, model: Model, seq_len: int, hardware: Hardware
) -> tuple[float | None, str]:
    """Seconds of an optimizer step: as stated, or from tokens/s, or from an MFU whose FLOPs the notes define. tokens:
    of a step, over all GPUs."""
    if (seconds := row.number("iter_time_s")) is not None:
        return seconds, "iter_time_s"
    if speed := row.number("tokens_per_s_per_gpu"):
        return tokens / (speed * gpus), "tokens_per_s_per_gpu"
    mfu = row.number("mfu_pct")
    if mfu and row.mentions(r"MFU model FLOPs counts full \(non-causal\) attention \+ lm_head"):
        flops = full_attention_flops(model, seq_len) * tokens
        return flops / (mfu / 100 * hardware.peak("bfloat16") * gpus), "mfu_pct"
    return None, ""


def full_attention_flops(model: Model, seq_len: int) -> float:
    """FLOPs of forward and backward a token of a dense gated model: products with every matrix, the head's included
    and the embedding's not, and attention without the causal mask."""
    layers, hidden, heads, ffn, vocab = (model.size(n) for n in ("layers", "hidden", "heads", "ffn", "vocab"))
    head_dim = model.size("head_dim") or hidden // heads
    kv_heads = model.size("kv_heads") or heads
    matrices = 2 * hidden * head_dim * (heads + kv_heads) + 3 * hidden * ffn
    return 3.0 * (2 * (layers * matrices + hidden * vocab) + 4 * layers * seq_len * heads * head_dim)


def memory_kind(row: Row) -> str:
    """torchtitan logs what the allocator reserved, and what is read of nodes comes from the driver; a peak is otherwise
    that of allocated tensors unless stated."""
    if row.mentions(r"torchtitan", "source"):
        return "reserved"
    if row.mentions(r"\bmem\w*\b[^;]*\bnodes\b"):
        return "device"
    if row.mentions(r"allocated|\balloc\b"):
        return "allocated"
    return "reserved" if row.mentions(r"reserved") else "allocated"
