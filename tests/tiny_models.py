"""Tiny models and batches, and a way to run a function in a few gloo processes."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from omnicompile.cluster import Cluster
from omnicompile.plan import BlockPlan, Layout, Mesh, Plan, Sharding
from omnicompile.workload import Workload

IMAGE, VIDEO, PAD = 120, 121, 0


def vision_language_model(layers: int = 2) -> nn.Module:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers, "use_cache": False,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {
        "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=122, vision_end_token_id=123, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen2VLForConditionalGeneration(config).float().train()


def dense_model(layers: int = 2) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).float().train()


def mixture_model(layers: int = 2, aux: bool = False) -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        decoder_sparse_step=1, max_position_embeddings=256, use_cache=False, tie_word_embeddings=False,
        output_router_logits=aux,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config).float().train()


def text_batch(seed: int, length: int = 32, rows: int = 1, vocab: int = 100) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, : 2 + seed % 5] = -100  # so that ranks have different numbers of targets
    return {"input_ids": ids, "labels": labels}


def image_batch(seed: int, grids: list[tuple[int, int, int]], length: int = 64) -> dict[str, Tensor]:
    """A row of text with an image for each grid (t, h, w in patches) in it."""
    batch = text_batch(seed, length)
    ids, kinds, position = batch["input_ids"], torch.zeros(1, length, dtype=torch.int), 4
    for t, h, w in grids:
        tokens = t * h * w // 4
        ids[0, position : position + tokens] = IMAGE
        kinds[0, position : position + tokens] = 1
        position += tokens + 3
    batch["labels"] = torch.where(ids == IMAGE, -100, batch["labels"])
    generator = torch.Generator().manual_seed(seed + 1000)
    patches = sum(t * h * w for t, h, w in grids)
    pixels = torch.randn(patches, 3 * 2 * 4 * 4, generator=generator)
    return batch | {"mm_token_type_ids": kinds, "image_grid_thw": torch.tensor(grids), "pixel_values": pixels}


def make_plan(blocks: tuple[str, ...], mesh: Mesh, sharding: Sharding = Sharding.FSDP, **choices: Any) -> Plan:
    layout = Layout.SEQUENCE if mesh.sp > 1 else Layout.BATCH
    block = BlockPlan(sharding=sharding, layout=layout, sp=mesh.sp, ep=mesh.ep, **choices)
    return Plan(
        model="tiny", cluster=Cluster(gpus=mesh.world), workload=Workload(seq_len=64), mesh=mesh,
        blocks=dict.fromkeys(blocks, block), param_dtype="float32",
    )  # fmt: skip


def reference_gradients(model: nn.Module, batches: list[dict[str, Tensor]]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the whole model on the batches together: as one batch where their rows can be joined,
    otherwise one after the other, normalised by the targets of all."""
    if len({(b["input_ids"].shape[1], tuple(sorted(b))) for b in batches}) == 1:
        batches = [{name: torch.cat([b[name] for b in batches]) for name in batches[0]}]
    counts = [int((b["labels"][:, 1:] != -100).sum()) for b in batches]
    total = 0.0
    model.zero_grad()
    for batch, count in zip(batches, counts):
        loss = model(**batch).loss * (count / sum(counts))
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def worst_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The measure of design 2.5: largest ||difference|| / max(||g||, 1e-6 * global norm)."""
    norm = torch.stack([g.norm() for g in want.values()]).norm()
    return max(float((got[n] - g).norm() / torch.maximum(g.norm(), 1e-6 * norm)) for n, g in want.items())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _entry(rank: int, world: int, port: int, work: Callable[..., Any], args: tuple[Any, ...], folder: str) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank)
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        result = work(rank, world, *args)
        torch.save(result, os.path.join(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()


def run_ranks(work: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """`work(rank, world, *args)` in `world` gloo processes; their results by rank."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_entry, (world, _free_port(), work, args, folder), nprocs=world)
        return [torch.load(os.path.join(folder, f"{rank}.pt"), weights_only=False) for rank in range(world)]
