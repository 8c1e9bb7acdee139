"""How a published run was laid out: columns and notes of its row as the keys of a given plan (`planner/given.py`).

What a row leaves open follows from its framework (`FRAMEWORKS`), which `source` names; assumptions, in general:
- `dp` counts the groups of ranks with batches of their own: dp x tp x pp x cp_or_sp = gpus, or the row contradicts
  itself. `fsdp` > 1 is the number of ranks that parameters are sharded over (with or without cp_or_sp in it). Where
  the notes speak of FSDP and no column says over how many ranks, it is all; where GPUs are not stated, and the notes
  say how many the publisher's runs of that model use, it is those. Such rows are weak.
- `cp_or_sp` is ring context parallelism, but an all-to-all of heads (Ulysses) for xtuner, InternEvo, DeepSpeed and
  VeOmni.
- `fsdp` = 1: ZeRO stage of the notes; otherwise Megatron with a fused attention has its distributed optimizer
  (ZeRO-1), and everything else replicates.
- A micro-batch that the notes call a local batch with pipeline stages is split into single samples.
- recompute "selective": of Megatron's layernorm and activations all that is cheap; of torchtitan's operator policy,
  which runs every other product again, all products in half of the layers; "selective layer" every other layer;
  "selective" alone (FSDP) the smallest share of whole layers that fits into memory. Not stated: none, or the first of
  selective and full that fits, since the run did.
- 8-bit floats are used by linear layers only. Inductor, Transformer Engine and Megatron's kernels fuse elementwise
  operators; other frameworks run them one by one unless the row says that it is compiled. What is not compiled is
  launched from Python. Transformer Engine and Liger keep only the inputs of norms and activations. Losses make
  float32 copies of logits unless the framework or the row fuses them.
- Experts across nodes are reached through all-to-alls of every copy of a token, but through DeepEP where the row says
  so and in NVIDIA's recipes of 2025 and later (Megatron-Bridge, AutoModel).
- "flash-attn" without a version is FlashAttention-1 for publishers of 2023 (`flash`), otherwise FlashAttention-2.
- A pipeline of FSDP ranks keeps gathered parameters through its micro-batches, as torchtitan does.
- Gradients are reduced in the dtype that the framework's recipes use (`reduce`), overlapped with the backward unless
  the notes say otherwise, the framework waits for it (`overlap`) or the run is of Megatron before its distributed
  optimizer. Collectives of tensor parallelism overlap with their GEMMs in NVIDIA's recipes and where stated.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from published_rows import Row, SkipRow

from omnicompile.cost_model.hardware import Hardware

SELECTIVE_SHARES = ("0.25", "0.5", "0.75", "1")
CHEAP = frozenset(["layernorm", "norm", "act", "moe_act", "swiglu", "op", "mla_up_proj", "shared_expert"])


@dataclass(frozen=True)
class Framework:
    """What a training framework implies. ulysses: its sequence parallelism. zero: stage where fsdp is 1 and no stage
    is stated. fused: elementwise operators run as few kernels without a compiler. reduce: dtype of gradients that are
    reduced. tp_sequence: its tensor parallelism splits the rest of a layer along the sequence. tp_overlap: its
    published recipes overlap the collectives of tensor parallelism. flash: its "flash-attn" without a version.
    recompute: on unless stated ("": not known). overlap: gradients are reduced beside the backward. loss_head: its
    own; fused_loss: its loss makes no float32 copies of logits. dedup: its experts are reached through DeepEP. kernels:
    its norms and activations are kernels that keep only their input (Transformer Engine, Liger). whole: a layer that
    is recomputed runs to its end (reentrant checkpoints), also where nothing reads its last product. Sums of input
    gradients run beside weight gradients since Megatron-LM of 2022, taken to be where attention is fused.
    broadcasts: its ZeRO-1 gives whole tensors to ranks, which broadcast them once they are updated."""

    name: str
    pattern: str
    ulysses: bool = False
    zero: int = 0
    fused: bool = False
    reduce: str = "float32"
    tp_sequence: bool = True
    tp_overlap: bool = False
    flash: str = "fa2"
    recompute: str = ""
    overlap: bool = True
    loss_head: str = "full"
    fused_loss: bool = False
    dedup: bool = False
    kernels: bool = False
    whole: bool = False
    broadcasts: bool = False


FRAMEWORKS = (
    Framework("automodel", r"automodel", fused=True, dedup=True, kernels=True),
    Framework("megatron-bridge", r"megatron-bridge", zero=1, fused=True, reduce="bfloat16", tp_overlap=True,
              fused_loss=True, dedup=True, kernels=True, whole=True),
    Framework("nvidia-recipe", r"dgxc|megatron-lm examples", zero=1, fused=True, reduce="bfloat16", tp_overlap=True,
              fused_loss=True, kernels=True, whole=True),
    Framework("paxml", r"pax(ml)?\b|jax", fused=True, reduce="bfloat16", recompute="full", fused_loss=True),
    Framework("megatron", r"megatron|nemo\b|vtrain|simumax|bigscience|korthikanti", zero=1, fused=True,
              kernels=True, whole=True),
    Framework("torchtitan", r"torchtitan"),
    Framework("fms", r"fms-fsdp", reduce="bfloat16"),
    Framework("composer", r"llm-foundry|mosaicml|composer", flash="fa1", fused_loss=True),
    Framework("nanotron", r"nanotron", overlap=False, fused=True),
    Framework("internevo", r"internevo|internlm train", ulysses=True, reduce="bfloat16", tp_sequence=False,
              flash="fa1", overlap=False, fused=True, fused_loss=True, whole=True, broadcasts=True),
    Framework("deepspeed", r"xtuner|deepspeed|swift", ulysses=True, reduce="bfloat16", recompute="full", whole=True),
    Framework("veomni", r"veomni", ulysses=True, recompute="full", loss_head="chunked",
              kernels=True),
)  # fmt: skip
OTHER = Framework("other", "")


@dataclass(frozen=True)
class RunLayout:
    """layout: keys of `given_plan`. alternatives: changes to it, tried in order until the plan fits into memory.
    micro_batch: samples. data_ranks: groups with batches of their own. modern: fused attention. assumed: what the row
    does not say, in words. weak: why that is too much for totals, or ""."""

    layout: dict[str, str]
    alternatives: tuple[dict[str, str], ...]
    framework: str
    gpus: int
    data_ranks: int
    micro_batch: int
    accumulation: int
    modern: bool
    assumed: tuple[str, ...] = ()
    weak: str = ""


@dataclass
class _Draft:
    row: Row
    framework: Framework
    layout: dict[str, str] = field(default_factory=dict)
    alternatives: tuple[dict[str, str], ...] = ()
    assumed: list[str] = field(default_factory=list)
    weak: str = ""


def framework_of(row: Row) -> Framework:
    text = f"{row['source']}; {row['model']}"
    return next((f for f in FRAMEWORKS if re.search(f.pattern, text, re.IGNORECASE)), OTHER)


def is_modern(row: Row) -> bool:
    """Whether attention is one fused kernel."""
    return not row.mentions(r"unfused|pre-flash", "attention_kernel")


def layout_of(row: Row, experts: bool, hardware: Hardware) -> RunLayout:
    """experts: whether the model has any. Raises SkipRow for a row whose layout is not stated, contradicts itself or
    is of a kind that is not priced."""
    _refuse(row)
    draft = _Draft(row, framework_of(row))
    gpus = _gpus(draft)
    data_ranks, context = _mesh(draft, gpus, experts)
    _sharding(draft, data_ranks, context)
    micro_batch, accumulation = _batch(draft, data_ranks)
    _recompute(draft)
    _numbers(draft)
    _attention(draft, hardware)
    _overlap(draft)
    return RunLayout(
        draft.layout, draft.alternatives, draft.framework.name, gpus, data_ranks, micro_batch, accumulation,
        is_modern(row), tuple(draft.assumed), draft.weak,
    )  # fmt: skip


def _refuse(row: Row) -> None:
    if row.mentions(r"\bLoRA\b|\bPEFT\b", "model", "notes", "source"):
        raise SkipRow("LoRA")
    if row.mentions(r"frozen"):
        raise SkipRow("parts of the model are frozen")


def _gpus(draft: _Draft) -> int:
    """Stated, or those that the publisher's runs of the model use: "GPU count not in figure (... runs use 128)"."""
    used = _noted(draft.row, r"GPU count not [^;]*runs use (\d+)\)")
    if draft.row.whole("gpus") is not None or used is None:
        return draft.row.needed("gpus")
    _weaken(draft, f"{used} GPUs", "number of GPUs not stated")
    return used


def _weaken(draft: _Draft, assumed: str, reason: str) -> None:
    draft.assumed.append(assumed)
    draft.weak = draft.weak or reason


def _mesh(draft: _Draft, gpus: int, experts: bool) -> tuple[int, int]:
    """Sets the degrees of the mesh but those of data parallelism; returns data ranks and the degree of cp_or_sp."""
    row = draft.row
    tp, pp, context = (row.needed(c) for c in ("tp", "pp", "cp_or_sp"))
    dp = row.whole("dp") or max(1, gpus // (tp * pp * context))
    if dp * tp * pp * context != gpus:
        raise SkipRow("contradiction: dp x tp x pp x cp_or_sp is not the number of GPUs")
    if experts:
        ep = row.whole("ep") or _noted(row, r"\bep_size (\d+)")
        if ep is None:
            raise SkipRow("ep not stated")
        _set(draft, "ep", ep)
        if row.mentions(r"DeepEP|HybridEP") or (draft.framework.dedup and not row.mentions(r"\bA2A\b|alltoall")):
            draft.layout["dedup_dispatch"] = "true"
        if expert_tp := _noted(row, r"\bETP\s*=?\s*(\d+)"):
            _set(draft, "expert_tp", expert_tp)
    _set(draft, "tp", tp)
    _set(draft, "pp", pp)
    _set(draft, "sp" if _ulysses(draft) else "cp", context)
    if pp > 1:
        _set(draft, "pipeline_chunks", pipeline_chunks(row))
    return dp, context


def _set(draft: _Draft, key: str, degree: int) -> None:
    if degree > 1:
        draft.layout[key] = str(degree)


def _noted(row: Row, pattern: str) -> int | None:
    found = row.notes_match(pattern)
    return int(found.group(1)) if found else None


def _ulysses(draft: _Draft) -> bool:
    if draft.row.mentions(r"\bring\b|zigzag", "attention_kernel") or draft.row.mentions(r"\bp2p\b"):
        return False
    return draft.framework.ulysses or draft.row.mentions(r"ulysses", "source", "attention_kernel", "model")


def pipeline_chunks(row: Row) -> int:
    """Virtual stages of a pipeline rank: "VP=5", "VPP=4", "VP=8 chunks"; 2 where only interleaving is named."""
    stated = _noted(row, r"\bVPP?\s*=\s*(\d+)")
    if stated is not None:
        return stated
    return 2 if row.mentions(r"\binterleaved 1F1B") else 1


def zero_stage(row: Row) -> int | None:
    """The stage of ZeRO that the notes state, its distributed optimizer included; None if none."""
    stated = _noted(row, r"\bZeRO[- ]?(?:stage )?([0-3])\b(?!-like)")
    if stated is None and row.mentions(r"\bdist(?:ributed)?[- ]opt"):
        return 1
    return stated


def _sharding(draft: _Draft, data_ranks: int, context: int) -> None:
    row = draft.row
    fsdp = row.whole("fsdp")
    if fsdp is None:
        if zero_stage(row) != 3 and not row.mentions(r"\bFSDP\b"):
            raise SkipRow("fsdp not stated")
        fsdp = data_ranks * context
        _weaken(draft, "parameters sharded over all data ranks", "fsdp not stated")
    if fsdp > 1:
        _fully_sharded(draft, data_ranks, context, fsdp)
        if row.mentions(r"sharding=SHARD_GRAD_OP") or "pp" in draft.layout:
            draft.layout["reshard"] = "false"
        return
    draft.layout["dp_shard"] = str(data_ranks)
    stage = zero_stage(row)
    if stage is None:
        stage = draft.framework.zero if is_modern(row) else 0
        draft.assumed.append(f"ZeRO stage {stage}")
    if data_ranks * context == 1 or stage == 0:
        draft.layout["sharding"] = "replicate"
    elif stage == 1:
        _optimizer_sharded(draft, data_ranks)
    else:
        draft.layout |= {"sharding": "fsdp", "reshard": "true" if stage == 3 else "false"}


def _fully_sharded(draft: _Draft, data_ranks: int, context: int, fsdp: int) -> None:
    if fsdp in (data_ranks, data_ranks * context):
        draft.layout |= {"sharding": "fsdp", "dp_shard": str(data_ranks)}
        return
    if (data_ranks * context) % fsdp or fsdp % context:
        raise SkipRow("contradiction: fsdp does not divide the data ranks")
    shard = fsdp // context
    draft.layout |= {"sharding": "hsdp", "dp_shard": str(shard), "dp_replicate": str(data_ranks // shard)}


def _optimizer_sharded(draft: _Draft, data_ranks: int) -> None:
    """ZeRO-1, over groups of "zero1 group=8" or "zero1=8" ranks; -1: over all data ranks."""
    draft.layout["sharding"] = "zero1"
    group = _noted(draft.row, r"\bzero1(?: group)?=(\d+)")
    if group and group < data_ranks:
        if data_ranks % group:
            raise SkipRow("contradiction: the group of ZeRO-1 does not divide the data ranks")
        draft.layout |= {"dp_shard": str(group), "dp_replicate": str(data_ranks // group)}


def _batch(draft: _Draft, data_ranks: int) -> tuple[int, int]:
    """Samples of a micro-batch, and micro-steps of a step."""
    row = draft.row
    samples, micro_batch = row.whole("global_batch_seqs"), row.whole("micro_batch")
    steps = _noted(row, r"\b(?:GA|grad_accum|grad(?:ient)? accumulation|micro_num)\s*=?\s*(\d+)\b(?!/)")
    if samples is None:
        micro_batch, steps = micro_batch or 1, steps or 1
        samples = micro_batch * steps * data_ranks
        assumed = f"global batch of {samples} (one sample a micro-batch, no accumulation unless stated)"
        _weaken(draft, assumed, "batch not stated")
    if micro_batch is None:
        raise SkipRow("micro_batch not stated")
    if samples % (micro_batch * data_ranks):
        raise SkipRow("contradiction: micro-batches of all data ranks do not divide the global batch")
    local = _noted(row, r"\blocal batch[ =](\d+)") or micro_batch
    if steps is not None and steps * local * data_ranks != samples:
        raise SkipRow("contradiction: accumulation x micro-batch x data ranks is not the global batch")
    if row.needed("pp") > 1 and row.mentions(r"micro_batch column = local batch"):
        micro_batch = 1
        draft.assumed.append("pipeline micro-batch of 1")
    draft.layout |= {"micro_batch": str(micro_batch), "accumulation": str(samples // (micro_batch * data_ranks))}
    return micro_batch, samples // (micro_batch * data_ranks)


def _recompute(draft: _Draft) -> None:
    text = draft.row["recompute"].lower()
    if not text and (noted := draft.row.notes_match(r"\b(\w+) recompute\b(?! cell)")) and "core_at" in noted.group(1):
        text = f"selective: {noted.group(1)}"
    if not text and draft.framework.recompute:
        draft.layout["recompute"] = draft.framework.recompute
        draft.assumed.append(f"recompute: {draft.framework.recompute}")
    elif not text:
        draft.assumed.append("recompute: none, or the first that fits")
        draft.alternatives = ({}, {"recompute": "selective"}, {"recompute": "full"})
    elif re.match(r"full|all\b|yes\b|true\b|activation_checkpointing=true", text) or "(full)" in text:
        draft.layout |= {"recompute": "full", "recompute_whole": str(draft.framework.whole).lower()}
        if "offload" in text:
            draft.layout["offload"] = "true"
    elif text.startswith("selective"):
        _selective(draft, text)
    elif not re.match(r"none|no\b|false\b|off\b", text):
        raise SkipRow("recompute of an unknown kind")


def _selective(draft: _Draft, text: str) -> None:
    """ "selective (core attention)", "selective op", "selective layer", "selective: mla_up_proj,mlp", "selective"."""
    words = frozenset(re.findall(r"[a-z_]+", text.removeprefix("selective"))) - {"per", "sac", "default", "toml"}
    if words & {"mlp", "moe"}:
        draft.layout["recompute"] = "except_attention"
        draft.assumed.append("recompute of all but attention, for that of the feed-forward part")
    elif re.search(r"core[_ ]att", text):
        draft.layout["recompute"] = "core_attention"
    elif "layer" in words:
        draft.layout |= {"recompute": "full", "recompute_share": "0.5"}
    elif draft.framework.name == "torchtitan" and ("op" in words or re.search(r"\((?:toml|torchtitan) default", text)):
        draft.layout |= {"recompute": "except_attention", "recompute_share": "0.5"}
    elif words & CHEAP:
        draft.layout["recompute"] = "selective"
    elif not words:
        draft.layout |= {"recompute": "full", "recompute_share": SELECTIVE_SHARES[0]}
        draft.alternatives = tuple({"recompute_share": share} for share in SELECTIVE_SHARES)
        draft.assumed.append("share of layers recomputed: the smallest that fits")
    else:
        raise SkipRow("selective recompute of an unknown kind")


def _numbers(draft: _Draft) -> None:
    """Dtypes, and how elementwise operators and the loss run."""
    row, layout = draft.row, draft.layout
    precision = row["precision"].lower()
    if not re.match(r"b(f|float)16|f(p|loat)16|(mx)?fp8", precision):
        raise SkipRow("precision not stated" if not precision else "precision of an unknown kind")
    layout["reduce_dtype"] = _reduce_dtype(draft, precision)
    if re.match(r"(mx)?fp8", precision):
        layout["gemm_dtype"] = "float8_rowwise" if "rowwise" in precision else "float8"
    if row.mentions(r"BF16 Adam moments"):
        layout["moment_dtype"] = "bfloat16"
    if row.mentions(r"optimizer offload"):
        layout["offload_optimizer"] = "true"
    if row["compiled"] != "y" and draft.framework.name != "paxml":
        layout["host_bound"] = str(not row.mentions(r"CUDA graphs? (full|attn)")).lower()
        if not draft.framework.fused:
            layout["compiled"] = "false"
    if draft.framework.broadcasts:
        layout["broadcast_updates"] = "true"
    if draft.framework.kernels and is_modern(row):
        layout["fused_kernels"] = "true"
    layout["fused_loss"] = str(draft.framework.fused_loss or row.mentions(r"\bCE fusion|fused cross")).lower()
    if row.mentions(r"chunked loss") or draft.framework.loss_head == "chunked":
        layout["loss_head"] = "chunked"


def _attention(draft: _Draft, hardware: Hardware) -> None:
    """The kernel, where it is not the one that the hardware file assumes: cuDNN and what is not stated are that."""
    kernel = draft.row["attention_kernel"].lower()
    if not is_modern(draft.row):
        draft.layout["attention_kernel"] = "unfused"
        return
    named = re.search(r"flash-?(?:attn|attention)?-?([34])", kernel)
    version = f"fa{named.group(1)}" if named else "fa2" if re.search(r"flash|sdpa", kernel) else ""
    if re.match(r"flash-?att\w*(?! ?-?\d)\b", kernel) and not named and "-2" not in kernel:
        version = draft.framework.flash
    if version in hardware.attention and version != hardware.attention_kernel and "cudnn" not in kernel:
        draft.layout["attention_kernel"] = version


def _reduce_dtype(draft: _Draft, precision: str) -> str:
    if "fp32 grad" in precision or "amp" in precision:
        return "float32"
    if "pure" in precision:
        return "bfloat16"
    return "float16" if re.match(r"f(p|loat)16", precision) else draft.framework.reduce


def _overlap(draft: _Draft) -> None:
    row, layout = draft.row, draft.layout
    if "tp" in layout:
        sequence = draft.framework.tp_sequence and is_modern(row)
        if row.mentions(r"no sequence.parallel|without sequence.parallel"):
            sequence = False
        elif row.mentions(r"sequence.parallel", "recompute") or row.mentions(r"\bSP on\b|\bSP;|sequence-parallel TP"):
            sequence = True
        layout["tp_sequence"] = str(sequence).lower()
        overlap = draft.framework.tp_overlap or row.mentions(r"async ?TP|\btp overlap|userbuffer")
        layout["tp_overlap"] = str(overlap and sequence).lower()
        layout["tp_async"] = str(is_modern(row)).lower()
    overlapped = (
        is_modern(row) and draft.framework.overlap and not row.mentions(r"no ZeRO overlap|use_gradient_bucket=false")
    )
    layout["overlap_gradients"] = str(overlapped).lower()
    layout["exchanges"] = "false"  # all-to-alls around attention and experts are waited for where they are
