"""Published rows as what is priced: real rows of several publishers, and what makes a row be left out."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from omnicompile.cost_model.hardware import load_hardware
from omnicompile.errors import InputError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
RUNS = BENCHMARKS / "data" / "runs.csv"


@pytest.fixture()
def rows_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("published_rows")


@pytest.fixture()
def specs_module(rows_module: ModuleType) -> ModuleType:
    return import_module("published_specs")


@pytest.fixture()
def rows(rows_module: ModuleType) -> dict[str, Any]:
    return {row.id: row for row in rows_module.read_rows(RUNS)}


def changed(row: Any, **columns: str) -> Any:
    return type(row)(row.text | columns)


LAYOUTS = {
    # FSDP: parameters over all ranks, gathered again or not; HSDP.
    "MPT-115": "sharding=fsdp dp_shard=8 micro_batch=1 accumulation=2 reduce_dtype=float32 attention_kernel=fa1 "
    "compiled=false overlap_gradients=true "
    "host_bound=true fused_loss=true",
    "FMS-001": "sharding=hsdp dp_shard=8 dp_replicate=16 micro_batch=2 accumulation=1 reduce_dtype=bfloat16 "
    "overlap_gradients=true "
    "fused_loss=false",
    "AWS-002": "sharding=fsdp dp_shard=32 micro_batch=1 accumulation=1 recompute=except_attention recompute_share=0.5 "
    "reduce_dtype=float32 "
    "gemm_dtype=float8 overlap_gradients=true "
    "fused_loss=false",
    "TITAN-033": "sharding=fsdp dp_shard=64 micro_batch=1 accumulation=1 recompute=full recompute_share=0.5 "
    "reduce_dtype=float32 compiled=false overlap_gradients=true "
    "host_bound=true fused_loss=false",
    # A ring, parameters sharded over it too; the notes call its micro-batch a local batch.
    "TITAN-016": "tp=8 pp=8 cp=2 pipeline_chunks=1 sharding=fsdp dp_shard=4 reshard=false micro_batch=1 accumulation=8 "
    "recompute=full reduce_dtype=float32 gemm_dtype=float8 attention_kernel=fa2 tp_sequence=true tp_overlap=true "
    "overlap_gradients=true "
    "fused_loss=false recompute_whole=false tp_async=true",
    # Ulysses: heads are exchanged.
    "XTL-003": "sp=8 sharding=fsdp dp_shard=1 micro_batch=1 accumulation=1 recompute=full reduce_dtype=bfloat16 "
    "compiled=false overlap_gradients=true "
    "host_bound=true fused_loss=false",
    # Megatron of today and of 2022.
    "DGXC-017": "tp=4 pp=8 pipeline_chunks=5 sharding=zero1 dp_shard=2 micro_batch=1 accumulation=64 "
    "reduce_dtype=bfloat16 gemm_dtype=float8 tp_sequence=true tp_overlap=true overlap_gradients=true "
    "host_bound=true fused_loss=true "
    "fused_kernels=true tp_async=true",
    "KORT-004": "tp=8 pp=8 pipeline_chunks=3 sharding=replicate dp_shard=1 micro_batch=1 accumulation=64 "
    "recompute=core_attention reduce_dtype=float16 attention_kernel=unfused tp_sequence=true tp_overlap=false "
    "overlap_gradients=false "
    "host_bound=true fused_loss=false tp_async=false",
    "KORT-001": "tp=8 sharding=replicate dp_shard=1 micro_batch=4 accumulation=1 recompute=full reduce_dtype=float16 "
    "attention_kernel=unfused tp_sequence=false tp_overlap=false overlap_gradients=false "
    "host_bound=true fused_loss=false recompute_whole=true tp_async=false",
    "BLOOM-001": "tp=8 pp=12 pipeline_chunks=1 sharding=zero1 dp_shard=4 micro_batch=1 accumulation=512 recompute=full "
    "reduce_dtype=float16 attention_kernel=unfused tp_sequence=false tp_overlap=false overlap_gradients=false "
    "host_bound=true fused_loss=false recompute_whole=true tp_async=false",
    "VTM-001": "sharding=replicate dp_shard=64 micro_batch=8 accumulation=1 recompute=full reduce_dtype=float16 "
    "attention_kernel=unfused overlap_gradients=false "
    "host_bound=true fused_loss=false recompute_whole=true",
    "XTQ-004": "ep=32 tp=2 pp=8 pipeline_chunks=4 dedup_dispatch=true sharding=zero1 dp_shard=16 micro_batch=1 "
    "accumulation=128 recompute=selective reduce_dtype=float32 tp_sequence=true tp_overlap=false "
    "overlap_gradients=true host_bound=true fused_loss=false "
    "fused_kernels=true tp_async=true",
    "XTQ-005": "ep=8 tp=2 pp=8 pipeline_chunks=1 sharding=zero1 dp_shard=16 micro_batch=1 accumulation=128 "
    "recompute=selective reduce_dtype=float32 tp_sequence=true tp_overlap=false overlap_gradients=false "
    "host_bound=true fused_loss=false "
    "fused_kernels=true tp_async=true",
    # ZeRO-1 within groups; ZeRO-0.
    "IEVO-025": "tp=2 sharding=zero1 dp_shard=4 micro_batch=4 accumulation=4 reduce_dtype=bfloat16 "
    "attention_kernel=fa1 tp_sequence=false tp_overlap=false overlap_gradients=false "
    "host_bound=true fused_loss=true broadcast_updates=true tp_async=true",
    "IEVO-010": "sharding=zero1 dp_shard=8 dp_replicate=2 micro_batch=2 accumulation=4 reduce_dtype=bfloat16 "
    "attention_kernel=fa1 overlap_gradients=false "
    "host_bound=true fused_loss=true broadcast_updates=true",
    "NANO-003": "tp=4 sharding=replicate dp_shard=128 micro_batch=2 accumulation=1 reduce_dtype=float32 "
    "attention_kernel=fa2 tp_sequence=true tp_overlap=false overlap_gradients=false "
    "host_bound=true fused_loss=false tp_async=true",
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_real_rows(rows: dict[str, Any], specs_module: ModuleType, name: str) -> None:
    wanted = dict(part.split("=") for part in LAYOUTS[name].split())
    wanted = {key: value for key, value in wanted.items() if (key, value) != ("pipeline_chunks", "1")}
    assert specs_module.spec_of(rows[name]).layout.layout == wanted | {"exchanges": "false"}


@pytest.mark.parametrize(
    ("name", "seconds", "origin"),
    [
        ("DGXC-006", 9.33, "iter_time_s"),
        ("MPT-115", 16 * 32768 / (8802 * 8), "tokens_per_s_per_gpu"),
        # 3 x (2 x products + 4 x length x width x layers) FLOPs a token, of 989 TFLOP/s.
        ("NANO-013", 3 * (2 * (16 * (4 * 2048**2 + 3 * 2048 * 8192) + 2048 * 131072) + 4 * 16 * 4096 * 2048)
         * 256 * 4096 / (0.3247 * 989e12 * 64), "mfu_pct"),
    ],
)  # fmt: skip
def test_measured_seconds(
    rows: dict[str, Any], specs_module: ModuleType, name: str, seconds: float, origin: str
) -> None:
    spec = specs_module.spec_of(rows[name])
    assert (spec.seconds, spec.seconds_from) == (pytest.approx(seconds), origin)


def test_memory_is_of_the_kind_that_the_publisher_measures(rows: dict[str, Any], specs_module: ModuleType) -> None:
    kinds = {"GOLD-001": "allocated", "TITAN-003": "reserved", "BLOOM-001": "device", "NANO-001": "allocated"}
    found = {name: specs_module.spec_of(rows[name]) for name in kinds}
    assert {name: spec.memory_kind for name, spec in found.items()} == kinds
    assert found["GOLD-001"].memory == 56.55 * 2**30


def test_machines(rows: dict[str, Any], specs_module: ModuleType) -> None:
    h100, a100 = load_hardware("h100"), load_hardware("a100")
    titan = specs_module.spec_of(rows["TITAN-003"]).hardware
    assert titan.memory_bandwidth == 2.4e12
    assert titan.memory_bytes > 94 * 2**30 > h100.memory_bytes
    assert 0.8 < titan.sustained_fraction / h100.sustained_fraction < 0.9
    small = specs_module.spec_of(rows["MPT-164"]).hardware
    assert small.memory_bytes < 40 * 2**30
    assert small.memory_bandwidth < a100.memory_bandwidth
    rates = {name: specs_module.spec_of(rows[name]).hardware.inter_link.bytes_per_second for name in
             ("BLOOM-001", "VTM-001", "FMS-001", "IEVO-001", "AWS-001", "KORT-001", "ZOO-003", "DGXC-006")}  # fmt: skip
    assert rates == {
        "BLOOM-001": 6.25e9, "VTM-001": 12.5e9, "FMS-001": 6.25e9, "IEVO-001": 6.25e9, "AWS-001": 50e9,
        "KORT-001": 25e9, "ZOO-003": 50e9, "DGXC-006": 50e9,
    }  # fmt: skip


def test_a_row_without_a_network_has_that_of_its_publisher(rows: dict[str, Any], specs_module: ModuleType) -> None:
    silent = rows["IEVO-049"]
    alone, _ = specs_module.specs_of([silent])
    beside, _ = specs_module.specs_of([silent, rows["IEVO-001"]])
    assert alone[0].hardware.inter_link.bytes_per_second == 25e9
    assert beside[0].hardware.inter_link.bytes_per_second == 6.25e9


def test_models(rows: dict[str, Any], specs_module: ModuleType) -> None:
    def config(name: str) -> dict[str, Any]:
        data: dict[str, Any] = specs_module.spec_of(rows[name]).model.data
        return data

    mpt = config("MPT-115")
    assert (mpt["model_type"], mpt["n_layer"], mpt["n_embd"], mpt["n_inner"]) == ("gpt2", 24, 1536, 6144)
    assert mpt["tie_word_embeddings"] is True
    bloom = config("BLOOM-001")
    assert (bloom["model_type"], bloom["vocab_size"]) == ("gpt2", 250880)
    internlm = config("IEVO-001")
    assert (internlm["model_type"], internlm["intermediate_size"], internlm["vocab_size"]) == ("llama", 11008, 103168)
    assert config("DGXC-035")["hidden_act"] == "relu2"
    assert config("GOLD-001")["model_type"] == "starcoder2"
    assert config("TITAN-042")["head_dim"] == 128
    cut = config("DGXC-024")
    assert (cut["num_hidden_layers"], cut["hidden_size"]) == (30, 16384)
    v3 = config("DGXC-195")
    assert (v3["n_routed_experts"], v3["first_k_dense_replace"], v3["kv_lora_rank"]) == (256, 3, 512)
    moonlight = config("SKIL-001")
    assert (moonlight["q_lora_rank"], moonlight["moe_intermediate_size"]) == (None, 1408)
    assert config("B200-007")["first_k_dense_replace"] == 0
    nano = config("NANO-001")
    assert nano["tie_word_embeddings"] is True
    assert config("NANO-003")["tie_word_embeddings"] is False


SKIPS = (
    ("DGXC-192", {}, "LoRA"),
    ("DGXC-197", {}, "hybrid of attention and state-space layers"),
    ("WAN-001", {}, "diffusion model"),
    ("GOLD-012", {}, "multimodal run: its encoders are not described"),
    ("GOLD-007", {}, "gpus not stated"),
    ("ZOO-007", {}, "neither step time, tokens/s nor memory stated"),
    ("NNS-001", {}, "tp not stated"),
    ("IEVO-055", {}, "seq_len not stated"),
    ("MBRG-030", {}, "contradiction: accumulation x micro-batch x data ranks is not the global batch"),
    ("MPT-115", {"gpus": "16"}, "contradiction: dp x tp x pp x cp_or_sp is not the number of GPUs"),
    ("MPT-115", {"global_batch_seqs": "15"}, "contradiction: micro-batches of all data ranks do not divide the global "
                                             "batch"),
    ("MPT-115", {"gpu": "TPU v5p"}, "GPU without a hardware file"),
    ("MPT-115", {"arch_notes": "layers=24"}, "size of the model not stated: hidden, heads, vocab"),
    ("MPT-115", {"recompute": "sometimes"}, "recompute of an unknown kind"),
    ("MPT-115", {"precision": "int8"}, "precision of an unknown kind"),
    ("MPT-115", {"notes": "vision encoder frozen"}, "parts of the model are frozen"),
)  # fmt: skip


@pytest.mark.parametrize(("name", "columns", "reason"), SKIPS)
def test_rows_that_cannot_be_predicted(
    rows: dict[str, Any], specs_module: ModuleType, name: str, columns: dict[str, str], reason: str
) -> None:
    specs, skipped = specs_module.specs_of([changed(rows[name], **columns)])
    assert (specs, [s.reason for s in skipped]) == ([], [reason])


def test_a_publisher_that_is_not_in_the_file(rows: dict[str, Any], specs_module: ModuleType) -> None:
    """Everything follows from columns and notes."""
    row = changed(
        rows["DGXC-017"], id="NEW-1", source="A cluster report, DeepSpeed", model="My 8B", gpus="32", dp="4", fsdp="",
        tp="4", pp="1", cp_or_sp="2", micro_batch="2", global_batch_seqs="32", precision="bf16", recompute="full",
        attention_kernel="flash-attn-3", iter_time_s="", tokens_per_s_per_gpu="1000", gpu="H800-80GB-SXM",
        notes="ZeRO-3; GA=4; 4 x 200 Gb/s InfiniBand; no sequence parallelism",
    )  # fmt: skip
    (spec,), skipped = specs_module.specs_of([row])
    assert not skipped
    layout = spec.layout.layout
    assert {key: layout[key] for key in ("tp", "sp", "sharding", "dp_shard", "accumulation", "tp_sequence")} == {
        "tp": "4", "sp": "2", "sharding": "fsdp", "dp_shard": "4", "accumulation": "4", "tp_sequence": "false",
    }  # fmt: skip
    assert "attention_kernel" not in layout
    assert spec.hardware.inter_link.bytes_per_second == 12.5e9
    assert spec.hardware.intra_link.bytes_per_second == 200e9
    assert spec.seconds == pytest.approx(32 * 8192 / (1000 * 32))


def test_weak_rows(rows: dict[str, Any], specs_module: ModuleType) -> None:
    weak = {name: specs_module.spec_of(rows[name]).weak for name in ("CARD-005", "XTL-001", "DGXC-163", "DGXC-171")}
    assert weak == {
        "CARD-005": "routing of experts not balanced", "XTL-001": "batch not stated", "DGXC-163": "fsdp not stated",
        "DGXC-171": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,gpu\nA-1,H100\n", "has no column source"),
        ("HEADER\nA-1,LINE\n", "gpus is no number: 'many'"),
        ("HEADER\n,LINE\n", "a row without an id"),
    ],
)
def test_bad_files(rows_module: ModuleType, tmp_path: Path, text: str, message: str) -> None:
    columns = rows_module.COLUMNS
    line = ",".join("many" if c == "gpus" else "" for c in columns[1:])
    path = tmp_path / "runs.csv"
    path.write_text(text.replace("HEADER", ",".join(columns)).replace("LINE", line))
    with pytest.raises(InputError, match=message):
        rows_module.read_rows(path)


def test_a_file_that_is_not_there(rows_module: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        rows_module.read_rows(tmp_path / "none.csv")
