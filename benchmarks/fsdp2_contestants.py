"""The two sides of `vs_fsdp2.py`: the same models under torch's `fully_shard` and under OmniCompile, and one rank's
measurements of them. `vs_fsdp2.py` says what is measured how."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from omnicompile.calibration.allocations import allocated_peak
from omnicompile.cluster import Cluster
from omnicompile.lowering.driver import default_lower
from omnicompile.lowering.graph_capture import DEFAULT_SEGMENTS
from omnicompile.plan import BlockPlan, LossHead, Mesh, Plan
from omnicompile.recompute import Recompute
from omnicompile.runtime.backends import BACKENDS
from omnicompile.runtime.budget import Budget
from omnicompile.runtime.engine import Engine, batch_signature
from omnicompile.runtime.mesh import build_mesh
from omnicompile.runtime.parallel_module import ParallelModule
from omnicompile.runtime.parallelize import parallelize
from omnicompile.runtime.weights import Given
from omnicompile.workload import Workload

OURS = "omnicompile "
IMAGE_TOKEN = 2000


@dataclass(frozen=True)
class Size:
    """hidden: width of the text model and of the encoder. layers: of each. tokens, patches: of a rank's micro-batch.
    vocab: entries. head: width of an attention head."""

    hidden: int
    layers: int
    tokens: int
    vocab: int = 2048
    patches: int = 256
    head: int = 32


CPU_SIZES = {"dense": Size(256, 8, 512), "vlm": Size(192, 4, 384), "moe": Size(192, 4, 384)}
GPU_SIZES = {
    "dense": Size(2048, 8, 4096, 32768, head=128),
    "vlm": Size(2048, 4, 4096, 32768, 2048, head=128),
    "moe": Size(2048, 4, 4096, 32768, head=128),
}
# Computing with these takes next to no time.
HOST_SIZES = {"dense": Size(64, 8, 32, head=16), "vlm": Size(64, 4, 32, patches=32), "moe": Size(64, 4, 32, head=16)}
SIZES = {"cpu": CPU_SIZES, "gpu": GPU_SIZES, "host": HOST_SIZES}


@dataclass
class Measured:
    """What one rank saw of one contestant. step: seconds of whole steps, the slowest rank's, by repeat. backward: of
    them until the end of the backward. cpu: CPU seconds of a step, summed over threads and averaged over ranks. peak:
    bytes, most of all ranks; held: of them between steps. first: seconds from the model to the end of the first step.
    losses: of every step, averaged over ranks."""

    step: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak: int = 0
    held: int = 0
    first: float = 0.0
    losses: list[float] = field(default_factory=list)


def build_model(kind: str, size: Size) -> nn.Module:
    """A float32 model in training mode, the same on every rank."""
    torch.manual_seed(0)
    text = {
        "vocab_size": size.vocab, "hidden_size": size.hidden, "intermediate_size": 3 * size.hidden,
        "num_hidden_layers": size.layers, "num_attention_heads": size.hidden // size.head, "use_cache": False,
        "num_key_value_heads": size.hidden // (2 * size.head), "max_position_embeddings": 2 * size.tokens,
    }  # fmt: skip
    return _BUILDERS[kind](text, size).float().train()


def _dense(text: dict[str, Any], size: Size) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**text, tie_word_embeddings=False))


def _moe(text: dict[str, Any], size: Size) -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": size.hidden, "head_dim": size.head}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**text, **experts, tie_word_embeddings=False))


def _vlm(text: dict[str, Any], size: Size) -> nn.Module:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [size.head // 8, 3 * size.head // 16, 3 * size.head // 16],
    }
    vision = {
        "depth": size.layers, "embed_dim": size.hidden, "hidden_size": size.hidden,
        "num_heads": size.hidden // size.head, "mlp_ratio": 2, "patch_size": 8,
        "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    tokens = {"image_token_id": IMAGE_TOKEN, "video_token_id": 2001, "vision_start_token_id": 2002}
    text = text | {"rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, **tokens, tie_word_embeddings=False)
    return Qwen2VLForConditionalGeneration(config)


_BUILDERS: Mapping[str, Callable[[dict[str, Any], Size], nn.Module]] = {"dense": _dense, "vlm": _vlm, "moe": _moe}


def make_batch(kind: str, size: Size, rank: int) -> dict[str, Tensor]:
    """One row of a rank's own tokens; all ranks have equally many targets, so that means of means are the mean."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(3, 1000, (1, size.tokens), generator=generator)
    if kind != "vlm":
        return {"input_ids": ids, "labels": ids.clone()}
    side = int((size.patches // 2) ** 0.5) // 2 * 2
    grids = torch.tensor([[1, side, side], [1, side, side]])
    kinds, labels, start = torch.zeros_like(ids), ids.clone(), 4
    for _ in range(2):
        span = slice(start, start + side * side // 4)
        ids[0, span], kinds[0, span], labels[0, span] = IMAGE_TOKEN, 1, -100
        start = span.stop + 2
    pixels = torch.randn(2 * side * side, 3 * 2 * 8 * 8, generator=generator)
    images = {"mm_token_type_ids": kinds, "image_grid_thw": grids, "pixel_values": pixels}
    return {"input_ids": ids, "labels": labels, **images}


def layers_of(model: nn.Module) -> Iterable[nn.Module]:
    """What is sharded and compiled one by one: the elements of module lists that are not inside of another."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    for name, modules in lists:
        if not any(name.startswith(f"{other}.") for other, _ in lists):
            yield from modules


def fully_sharded(model: nn.Module, device: torch.device, compiled: bool, dtype: torch.dtype) -> nn.Module:
    """The usual recipe: every layer is a unit (compiled by itself), the rest another; gathered again for the backward,
    the root's too, as OmniCompile does."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=True)
    model.to(device)
    for layer in layers_of(model):
        if compiled:
            layer.compile()
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def make_plan(kind: str, size: Size, world: int, dtype: torch.dtype, policy: Recompute = Recompute.NONE) -> Plan:
    """The same layout: parameters over all ranks, every rank its own rows, whole logits."""
    blocks = dict.fromkeys(("text", "vision") if kind == "vlm" else ("text",), BlockPlan(recompute=policy))
    return Plan(
        model=kind, cluster=Cluster(gpus=world), workload=Workload(seq_len=size.tokens), mesh=Mesh(dp_shard=world),
        blocks=blocks, loss_head=LossHead.FULL, param_dtype=str(dtype).split(".")[-1],
        reduce_dtype="float32",
    )  # fmt: skip


def parallelized(model: nn.Module, plan: Plan, device: torch.device, batch: dict[str, Tensor], backend: str) -> Any:
    if plan.mesh.world > 1:
        return parallelize(model, plan, device.type, batch, backend)
    # One process: `parallelize` would give the plain model back, and the graph is what is to be measured.
    mesh = build_mesh(plan.mesh, device.type)
    engine = Engine(model, plan, mesh, default_lower, BACKENDS[backend], torch.float32, DEFAULT_SEGMENTS)
    loaded = engine.program(batch, batch_signature(batch, True), logits=False)
    return ParallelModule(engine, loaded.program.params, Given(dict(model.named_parameters())), Budget.of(model, batch))


class Contestant:
    """A model, its optimizer, and one training step of it."""

    def __init__(self, name: str, kind: str, size: Size, device: torch.device) -> None:
        world, rank = dist.get_world_size(), dist.get_rank()
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        batch, model = make_batch(kind, size, rank), build_model(kind, size)
        self.device, self.seen = device, Measured()
        self.ours = name.startswith(OURS)
        if self.ours:
            backend, _, policy = name.removeprefix(OURS).partition(", ")
            plan = make_plan(kind, size, world, dtype, Recompute(policy or "none"))
            self.model = parallelized(model, plan, device, batch, backend)
        else:
            self.model = fully_sharded(model, device, name.endswith("compiled"), dtype)
        self.batch = {k: v.to(device) for k, v in batch.items()}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, foreach=True)

    def step(self) -> float:
        """Returns the time at which the backward was done."""
        loss = self.model(**self.batch).loss
        loss.backward()
        self._finish()
        middle = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._finish()
        loss = loss.detach().clone()
        if not self.ours:
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        self.seen.losses.append(loss.item())
        return middle

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def timed_step(self) -> None:
        dist.barrier()
        start, cpu = time.perf_counter(), time.process_time()
        middle = self.step()
        end, cpu = time.perf_counter(), time.process_time() - cpu
        used = torch.tensor(cpu / dist.get_world_size(), device=self.device)
        dist.all_reduce(used)
        times = torch.tensor([end - start, middle - start], device=self.device)
        dist.all_reduce(times, op=dist.ReduceOp.MAX)
        self.seen.step.append(round(times[0].item(), 5))
        self.seen.backward.append(round(times[1].item(), 5))
        self.seen.cpu.append(round(used.item(), 5))

    def held_bytes(self) -> int:
        """Bytes of what is kept between steps: parameters, buffers and optimizer states of this rank."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        tensors += [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        return sum(_local(t).untyped_storage().nbytes() for t in tensors)

    def measure_peak(self) -> None:
        gc.collect()
        peak = self._cuda_peak() if self.device.type == "cuda" else self.held_bytes() + allocated_peak(self.step)
        both = torch.tensor([peak, self.held_bytes()], device=self.device)
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        self.seen.peak, self.seen.held = both.tolist()

    def _cuda_peak(self) -> int:
        """Several contestants share the GPU: what the step allocates beyond what was there, and what this one holds."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step()
        return self.held_bytes() + torch.cuda.max_memory_allocated() - before


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor.to_local() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor
    return local


def measure(kind: str, size: Size, names: list[str], repeats: int, say: Callable[[str], None]) -> dict[str, Measured]:
    """Steps of all contestants in turns, in this rank: two to warm up, `repeats` that are timed, one for memory."""
    device = torch.device("cuda", dist.get_rank()) if torch.cuda.is_available() else torch.device("cpu")
    contestants: dict[str, Contestant] = {}
    for name in names:
        start = time.perf_counter()
        contestants[name] = Contestant(name, kind, size, device)
        built = time.perf_counter()
        contestants[name].step()
        contestants[name].seen.first = round(time.perf_counter() - start, 2)
        say(f"{kind}, {name}: built in {built - start:.1f} s, first step {time.perf_counter() - built:.1f} s")
        contestants[name].step()
    order = list(contestants.values())
    for repeat in range(repeats):
        turn = repeat % len(order)
        for contestant in order[turn:] + order[:turn]:
            contestant.timed_step()
    for contestant in order:
        contestant.measure_peak()
    return {name: contestant.seen for name, contestant in contestants.items()}


def run_rank(
    rank: int, world: int, port: int, names: dict[str, list[str]], repeats: int, sizes: str, folder: str
) -> None:
    """What each spawned process does; rank 0 writes its measurements of each model into `folder`. sizes: of `SIZES`."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    say = partial(print, file=sys.stderr, flush=True) if rank == 0 else _quiet
    try:
        for kind in names:
            seen = measure(kind, SIZES[sizes][kind], names[kind], repeats, say)
            if rank == 0:
                text = json.dumps({name: vars(found) for name, found in seen.items()})
                (Path(folder) / f"{kind}.json").write_text(text)
            torch.compiler.reset()
            gc.collect()
    finally:
        dist.destroy_process_group()


def _quiet(text: str) -> None:
    pass
