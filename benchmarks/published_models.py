"""The model of a published run as a Hugging Face configuration: from `arch_notes`, and for well-known public models
whose row leaves sizes out, from their published config.json (`PUBLIC`). A size that neither states skips the row.

Shapes stand for the model, not its weights: learned positions and ALiBi are priced as GPT-2 (learned positions), GELU
models with grouped queries as StarCoder2, squared ReLU as Nemotron, other dense ones as Llama (Qwen3 with a head
dimension of its own, Command-R as Cohere), experts as Mixtral, Qwen3-MoE, GPT-OSS, Llama-4 or DeepSeek-V3. Assumed:
GPT models tie their embeddings (as Megatron does) unless stated, others do not; a GPT vocabulary that is not stated
is 51,200; a model cut to "(N layers)" has no dense layers before its experts unless stated.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from published_rows import Row, SkipRow

SIZES = ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "moe_ffn", "experts", "shared", "topk", "vocab")
POSITIONS = 1 << 20
"""Longest sequence of models with learned positions when they are captured; see `published_runs.with_positions`."""

_GPT3 = {"kv_heads": 0, "vocab": 50257}
PUBLIC: tuple[tuple[str, dict[str, int]], ...] = (
    (r"gpt-?3.*\b125m", _GPT3 | {"layers": 12, "hidden": 768, "heads": 12}),
    (r"gpt-?3.*\b355m", _GPT3 | {"layers": 24, "hidden": 1024, "heads": 16}),
    (r"gpt-?3.*\b760m", _GPT3 | {"layers": 24, "hidden": 1536, "heads": 16}),
    (r"gpt-?3.*\b1\.3b", _GPT3 | {"layers": 24, "hidden": 2048, "heads": 16}),
    (r"gpt-?3.*\b2\.7b", _GPT3 | {"layers": 32, "hidden": 2560, "heads": 32}),
    (r"gpt-?3.*\b175b", {"layers": 96, "hidden": 12288, "heads": 96, "kv_heads": 0, "vocab": 51200}),
    (r"llama-?2.*\b7b", {"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 32, "ffn": 11008, "vocab": 32000}),
    (r"llama-?2.*\b13b", {"layers": 40, "hidden": 5120, "heads": 40, "kv_heads": 40, "ffn": 13824, "vocab": 32000}),
    (r"llama-?2.*\b70b", {"layers": 80, "hidden": 8192, "heads": 64, "kv_heads": 8, "ffn": 28672, "vocab": 32000}),
    (r"llama-?3.*\b8b", {"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "ffn": 14336, "vocab": 128256}),
    (r"llama-?3.*\b70b", {"layers": 80, "hidden": 8192, "heads": 64, "kv_heads": 8, "ffn": 28672, "vocab": 128256}),
    (r"llama-?3.*\b405b", {"layers": 126, "hidden": 16384, "heads": 128, "kv_heads": 8, "ffn": 53248, "vocab": 128256}),
    (r"mistral.*\b7b", {"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "ffn": 14336, "vocab": 32000}),
    (r"internlm.*\b7b", {"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 32, "ffn": 11008, "vocab": 103168}),
    (r"internlm.*\b20b", {"layers": 60, "hidden": 5120, "heads": 40, "kv_heads": 40, "ffn": 13824, "vocab": 103168}),
    (r"qwen2\.5.*\b7b", {"layers": 28, "hidden": 3584, "heads": 28, "kv_heads": 4, "ffn": 18944, "vocab": 152064}),
    (r"qwen2\.5.*\b14b", {"layers": 48, "hidden": 5120, "heads": 40, "kv_heads": 8, "ffn": 13824, "vocab": 152064}),
    (r"qwen2\.5.*\b32b", {"layers": 64, "hidden": 5120, "heads": 40, "kv_heads": 8, "ffn": 27648, "vocab": 152064}),
    (r"72b dense|qwen2.*\b72b",
     {"layers": 80, "hidden": 8192, "heads": 64, "kv_heads": 8, "ffn": 29568, "vocab": 152064}),
    (r"qwen3.*\b8b", {"layers": 36, "hidden": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "ffn": 12288,
                      "vocab": 151936}),
    (r"qwen3.*\b32b", {"layers": 64, "hidden": 5120, "heads": 64, "kv_heads": 8, "head_dim": 128, "ffn": 25600,
                       "vocab": 151936}),
    (r"qwen3.*30b-a3b", {"layers": 48, "hidden": 2048, "heads": 32, "kv_heads": 4, "head_dim": 128, "moe_ffn": 768,
                         "experts": 128, "topk": 8, "vocab": 151936}),
    (r"qwen3.*235b", {"layers": 94, "hidden": 4096, "heads": 64, "kv_heads": 4, "head_dim": 128, "moe_ffn": 1536,
                      "experts": 128, "topk": 8, "vocab": 151936}),
    (r"mixtral.*8x7b", {"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "ffn": 14336, "experts": 8,
                        "topk": 2, "vocab": 32000}),
    (r"mixtral.*8x22b", {"layers": 56, "hidden": 6144, "heads": 48, "kv_heads": 8, "ffn": 16384, "experts": 8,
                         "topk": 2, "vocab": 32768}),
    (r"gpt-oss.*20b", {"layers": 24, "hidden": 2880, "heads": 64, "kv_heads": 8, "head_dim": 64, "moe_ffn": 2880,
                       "experts": 32, "topk": 4, "vocab": 201088}),
    (r"gpt-oss.*120b", {"layers": 36, "hidden": 2880, "heads": 64, "kv_heads": 8, "head_dim": 64, "moe_ffn": 2880,
                        "experts": 128, "topk": 4, "vocab": 201088}),
    (r"llama-?4.*maverick", {"layers": 48, "hidden": 5120, "heads": 40, "kv_heads": 8, "head_dim": 128, "ffn": 16384,
                             "moe_ffn": 8192, "experts": 128, "topk": 1, "shared": 1, "step": 2, "vocab": 202048}),
    (r"llama-?4.*scout", {"layers": 48, "hidden": 5120, "heads": 40, "kv_heads": 8, "head_dim": 128, "ffn": 16384,
                          "moe_ffn": 8192, "experts": 16, "topk": 1, "shared": 1, "step": 1, "vocab": 202048}),
    (r"deepseek.?v3", {"layers": 61, "dense": 3, "hidden": 7168, "heads": 128, "q_lora": 1536, "kv_lora": 512,
                       "ffn": 18432, "moe_ffn": 2048, "experts": 256, "shared": 1, "topk": 8, "vocab": 129280}),
    (r"deepseek.?v2", {"layers": 60, "dense": 1, "hidden": 5120, "heads": 128, "q_lora": 1536, "kv_lora": 512,
                       "ffn": 12288, "moe_ffn": 1536, "experts": 160, "shared": 2, "topk": 6, "vocab": 102400}),
    (r"moonlight", {"layers": 27, "dense": 1, "hidden": 2048, "heads": 16, "q_lora": 0, "kv_lora": 512, "ffn": 11264,
                    "moe_ffn": 1408, "experts": 64, "shared": 2, "topk": 6, "vocab": 163840}),
    (r"kimi.?k2", {"layers": 61, "dense": 1, "hidden": 7168, "heads": 64, "q_lora": 1536, "kv_lora": 512,
                   "ffn": 18432, "moe_ffn": 2048, "experts": 384, "shared": 1, "topk": 8, "vocab": 163840}),
    (r"command-?r\+?.*104b", {"layers": 64, "hidden": 12288, "heads": 96, "kv_heads": 8, "ffn": 33792,
                              "vocab": 256000}),
)  # fmt: skip
NOT_TRANSFORMERS = (
    (r"mamba|hybrid|\bGDN\b|qwen3-next|nemotron v3|nemotron-3|nemotron-h\b",
     "hybrid of attention and state-space layers"),
    (r"diffusion|\bDiT\b|\bwan \d", "diffusion model"),
    (r"\bVLM\b|omni|multimodal|llava|\bVL\b|CLIP|image-text", "multimodal run: its encoders are not described"),
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """config: a config.json with `architectures`, as JSON text. learned_positions: its table has as many rows as the
    sequence is long. sizes: as parsed, for formulas and reports."""

    name: str
    config: str
    learned_positions: bool
    sizes: tuple[tuple[str, int], ...]

    @property
    def data(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(self.config)
        return loaded

    def size(self, name: str) -> int:
        return dict(self.sizes).get(name, 0)


def model_of(row: Row) -> Model:
    """Raises SkipRow for models that are no plain transformers, or whose sizes are not all known."""
    for pattern, reason in NOT_TRANSFORMERS:
        if row.mentions(pattern, "model", "arch_notes"):
            raise SkipRow(reason)
    sizes = _sizes(row)
    family = _family(row, sizes)
    config = FAMILIES[family](row, sizes)
    config |= {"tie_word_embeddings": _tied(row, family), "vocab_size": sizes["vocab"], "torch_dtype": "bfloat16"}
    return Model(row["model"], json.dumps(config, sort_keys=True), family == "gpt2", tuple(sorted(sizes.items())))


def _sizes(row: Row) -> dict[str, int]:
    """Sizes that the row states, before those of the public model that its name means."""
    known = next((dict(s) for pattern, s in PUBLIC if re.search(pattern, row["model"], re.IGNORECASE)), {})
    stated = parse_sizes(row["arch_notes"])
    if cut := re.search(r"\((\d+) layers\)", row["model"]):
        stated["layers"] = int(cut.group(1))
    if "layers" in stated and stated["layers"] != known.get("layers"):
        known.pop("dense", None)
    sizes = known | stated
    if "vocab" not in sizes and re.match(r"GPT\b", row["model"]):
        sizes["vocab"] = 51200
    return sizes


def parse_sizes(text: str) -> dict[str, int]:
    """Sizes from "layers=61(3 dense),hidden=7168,...". Of two alternatives (a/b) the last, of a rounded and a padded
    vocabulary the padded one."""
    found: dict[str, int] = {}
    for name in (*SIZES, "q_lora", "kv_lora"):
        match = re.search(rf"(?<![a-z_]){name}\s*[=~]\s*~?(\d+)(?:/(\d+))?(k\b)?", text)
        if match:
            found[name] = int(match.group(2) or match.group(1)) * (1000 if match.group(3) else 1)
    if padded := re.search(r"vocab[^,]*padded (\d+)", text):
        found["vocab"] = int(padded.group(1))
    if dense := re.search(r"layers=\d+\((\d+) dense", text):
        found["dense"] = int(dense.group(1))
    return found


def _family(row: Row, sizes: dict[str, int]) -> str:
    name = row["model"].lower()
    if row.mentions(r"\bMLA\b", "arch_notes") or sizes.get("kv_lora"):
        return "deepseek_v3"
    for pattern, family in ((r"gpt-oss", "gpt_oss"), (r"llama-?4", "llama4_text"), (r"mixtral", "mixtral")):
        if re.search(pattern, name):
            return family
    if sizes.get("experts"):
        return "qwen3_moe"
    if row.mentions(r"squared.?relu", "arch_notes"):
        return "nemotron"
    if _non_gated(row, sizes):
        return "gpt2" if sizes.get("kv_heads") in (None, 0, sizes.get("heads")) else "starcoder2"
    if re.search(r"command-?r|cohere", name):
        return "cohere"
    own_dim = sizes.get("head_dim", 0) not in (0, sizes.get("hidden", 0) // max(1, sizes.get("heads", 1)))
    return "qwen3" if own_dim or "qwen3" in name else "llama"


def _non_gated(row: Row, sizes: dict[str, int]) -> bool:
    if row.mentions(r"non-gated|\bGELU\b", "arch_notes"):
        return True
    plain = re.search(r"\bgpt", row["model"], re.IGNORECASE) and not row.mentions(r"swiglu|gated", "arch_notes")
    return bool(plain) and sizes.get("ffn", 4 * sizes.get("hidden", 0)) == 4 * sizes.get("hidden", 0)


def _tied(row: Row, family: str) -> bool:
    if stated := re.search(r"tied[_-]emb(?:\w*)?(?:=(True|False))?|\b(untied)\b", row["arch_notes"]):
        return stated.group(1) != "False" and not stated.group(2)
    return family in ("gpt2", "cohere")


def _need(sizes: dict[str, int], *names: str) -> list[int]:
    missing = [n for n in names if n not in sizes]
    if missing:
        raise SkipRow(f"size of the model not stated: {', '.join(missing)}")
    return [sizes[n] for n in names]


def _common(kind: str, architecture: str, sizes: dict[str, int]) -> dict[str, Any]:
    layers, hidden, heads, _ = _need(sizes, "layers", "hidden", "heads", "vocab")
    return {
        "model_type": kind, "architectures": [architecture], "num_hidden_layers": layers, "hidden_size": hidden,
        "num_attention_heads": heads, "num_key_value_heads": sizes.get("kv_heads") or heads,
        "max_position_embeddings": 1 << 21,
    }  # fmt: skip


def _gpt2(row: Row, sizes: dict[str, int]) -> dict[str, Any]:
    layers, hidden, heads, _ = _need(sizes, "layers", "hidden", "heads", "vocab")
    return {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": layers, "n_embd": hidden,
        "n_head": heads, "n_inner": sizes.get("ffn", 4 * hidden), "n_positions": POSITIONS, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "activation_function": "gelu",
    }  # fmt: skip


def _dense(kind: str, architecture: str, **more: Any) -> Any:
    def build(row: Row, sizes: dict[str, int]) -> dict[str, Any]:
        common = _common(kind, architecture, sizes)
        (ffn,) = _need(sizes, "ffn")
        config = common | {"intermediate_size": ffn} | more
        return config | ({"head_dim": sizes["head_dim"]} if sizes.get("head_dim") else {})

    return build


def _mixtral(row: Row, sizes: dict[str, int]) -> dict[str, Any]:
    ffn, experts, topk = _need(sizes, "ffn", "experts", "topk")
    config = _common("mixtral", "MixtralForCausalLM", sizes)
    return config | {"intermediate_size": ffn, "num_local_experts": experts, "num_experts_per_tok": topk}


def _qwen3_moe(row: Row, sizes: dict[str, int]) -> dict[str, Any]:
    ffn, experts, topk = _need(sizes, "moe_ffn", "experts", "topk")
    if sizes.get("shared"):
        raise SkipRow("experts of an unknown kind (shared ones without MLA)")
    config = _common("qwen3_moe", "Qwen3MoeForCausalLM", sizes)
    head_dim = sizes.get("head_dim") or sizes["hidden"] // sizes["heads"]
    return config | {
        "moe_intermediate_size": ffn, "intermediate_size": ffn, "num_experts": experts, "num_experts_per_tok": topk,
        "head_dim": head_dim, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    }  # fmt: skip


def _gpt_oss(row: Row, sizes: dict[str, int]) -> dict[str, Any]:
    experts, topk = _need(sizes, "experts", "topk")
    config = _common("gpt_oss", "GptOssForCausalLM", sizes)
    return config | {
        "intermediate_size": sizes.get("moe_ffn", sizes["hidden"]), "num_local_experts": experts,
        "num_experts_per_tok": topk, "head_dim": sizes.get("head_dim", 64),
    }  # fmt: skip


def _llama4(row: Row, sizes: dict[str, int]) -> dict[str, Any]:
    ffn, moe_ffn, experts, topk, step = _need(sizes, "ffn", "moe_ffn", "experts", "topk", "step")
    config = _common("llama4_text", "Llama4ForCausalLM", sizes)
    return config | {
        "intermediate_size": moe_ffn, "intermediate_size_mlp": ffn, "num_local_experts": experts,
        "num_experts_per_tok": topk, "interleave_moe_layer_step": step, "head_dim": sizes.get("head_dim", 128),
    }  # fmt: skip


def _deepseek(row: Row, sizes: dict[str, int]) -> dict[str, Any]:
    ffn, moe_ffn, experts, topk, kv_lora = _need(sizes, "ffn", "moe_ffn", "experts", "topk", "kv_lora")
    config = _common("deepseek_v3", "DeepseekV3ForCausalLM", sizes)
    return config | {
        "num_key_value_heads": sizes["heads"], "intermediate_size": ffn, "moe_intermediate_size": moe_ffn,
        "n_routed_experts": experts, "n_shared_experts": sizes.get("shared", 0) or None, "num_experts_per_tok": topk,
        "kv_lora_rank": kv_lora, "q_lora_rank": sizes.get("q_lora") or None, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "first_k_dense_replace": sizes.get("dense", 0), "n_group": 1,
        "topk_group": 1,
    }  # fmt: skip


FAMILIES: dict[str, Any] = {
    "gpt2": _gpt2,
    "starcoder2": _dense("starcoder2", "Starcoder2ForCausalLM", use_bias=True, sliding_window=None,
                         residual_dropout=0.0, embedding_dropout=0.0),
    "nemotron": _dense("nemotron", "NemotronForCausalLM", hidden_act="relu2"),
    "llama": _dense("llama", "LlamaForCausalLM"),
    "qwen3": _dense("qwen3", "Qwen3ForCausalLM"),
    "cohere": _dense("cohere", "CohereForCausalLM"),
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "gpt_oss": _gpt_oss,
    "llama4_text": _llama4,
    "deepseek_v3": _deepseek,
}  # fmt: skip
