"""Train a tiny Qwen2-VL, distributed or not; the losses are the same.

    python examples/train_qwen2_vl.py
    torchrun --nproc-per-node 2 examples/train_qwen2_vl.py
    torchrun --nproc-per-node 4 examples/train_qwen2_vl.py --check

Four processes run as two groups with their own images each; within a group two processes share every sequence
(Ulysses), and parameters are sharded over all four. `--check` also trains the plain model on rank 0 and compares.

This is a loop of one's own over batches made by hand. `omnicompile train` on `examples/train` does the same from files,
with packing, checkpoints and evaluation (docs/training.md).
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

import omnicompile
from omnicompile.plan import BlockPlan, Layout, Mesh, Plan
from omnicompile.runtime.plain_module import PlainModule
from omnicompile.train import train_step

IMAGE_TOKEN, SAMPLES = 120, 4
# Tokens, and height and width of each image in patches. The first sample fills the budget of 64 tokens and 96 patches;
# what the others lack is filled up with padding, for the last one, which has no image, with a dummy image.
SAMPLE_SHAPES = ((64, [(4, 8), (8, 8)]), (64, [(6, 16)]), (52, [(8, 4), (4, 8)]), (38, []))


def build_model() -> torch.nn.Module:
    text = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "use_cache": False,
        "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 4]},
    }  # fmt: skip
    vision = {
        "depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN, video_token_id=121,
        vision_start_token_id=122, vision_end_token_id=123, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen2VLForConditionalGeneration(config).float().train()


def sample(index: int) -> dict[str, Tensor]:
    """One packed sequence with its images; labels are the text, not the placeholders of images."""
    generator = torch.Generator().manual_seed(index)
    length, images = SAMPLE_SHAPES[index]
    ids = torch.randint(3, 100, (1, length), generator=generator)
    labels, kinds, position = ids.clone(), torch.zeros_like(ids), 4
    for height, width in images:
        tokens = height * width // 4
        ids[0, position : position + tokens] = IMAGE_TOKEN
        kinds[0, position : position + tokens] = 1
        labels[0, position : position + tokens] = -100
        position += tokens + 2
    batch = {"input_ids": ids, "labels": labels}
    if not images:
        return batch
    grids = torch.tensor([[1, height, width] for height, width in images])
    patches = int(grids.prod(1).sum())
    pixels = torch.randn(patches, 3 * 2 * 4 * 4, generator=generator)
    return batch | {"mm_token_type_ids": kinds, "image_grid_thw": grids, "pixel_values": pixels}


def make_plan(world: int) -> Plan:
    sp = 2 if world >= 4 else 1
    mesh = Mesh(dp_shard=world // sp, sp=sp)
    block = BlockPlan(layout=Layout.SEQUENCE if sp > 1 else Layout.BATCH, sp=sp)
    return Plan(
        model="examples/train_qwen2_vl.py", cluster=omnicompile.Cluster(gpus=world),
        workload=omnicompile.Workload(seq_len=64), mesh=mesh, blocks={"text": block, "vision": block},
        param_dtype="float32",
    )  # fmt: skip


def train(model: torch.nn.Module, micro_batches: list[dict[str, Tensor]], steps: int) -> list[float]:
    """micro_batches: of this process, all of one step. Returns the global loss of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    return [train_step(model, optimizer, micro_batches, clip=1.0).loss for _ in range(steps)]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--steps", type=int, default=8)
    arguments.add_argument("--check", action="store_true", help="train the plain model too, and compare")
    arguments.add_argument("--backend", default="step", help="inductor, step, torch.compile or eager")
    options = arguments.parse_args()
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if SAMPLES % world and world != 1:
        raise SystemExit(f"{SAMPLES} samples cannot be dealt out to {world} processes: use 1, 2 or 4")
    plan = make_plan(world)
    groups, group = plan.mesh.data_ranks, rank // plan.mesh.sp
    micro_batches = [sample(micro * groups + group) for micro in range(SAMPLES // groups)]
    module = omnicompile.parallelize(build_model(), plan, "cpu", example_batch=sample(0), backend=options.backend)
    losses = train(module, micro_batches, options.steps)
    if rank == 0:
        print("loss by step: " + " ".join(f"{loss:.5f}" for loss in losses))
        if options.check:
            want = train(PlainModule(build_model()), [sample(i) for i in range(SAMPLES)], options.steps)
            worst = max(abs(a - b) for a, b in zip(losses, want))
            print(f"one process:  {' '.join(f'{loss:.5f}' for loss in want)}\nlargest difference: {worst:.1e}")
            if worst > 1e-3 or losses[-1] >= losses[0]:
                raise SystemExit("the distributed run does not equal one process")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
