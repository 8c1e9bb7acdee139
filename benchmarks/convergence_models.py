"""The three models of the convergence study, at tiny size, with an image tokenizer that knows the study's pictures."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from convergence_data import NAMES, Sample, draw, tasks_of, tokenizer
from convergence_precision import in_dtype
from torch import Tensor, nn

from omnicompile import omni
from omnicompile.cluster import Cluster
from omnicompile.omni import OmniModel, OmniProcessor
from omnicompile.omni.decoder import DiscreteDecoder
from omnicompile.plan import BlockPlan, Layout, Mesh, Plan
from omnicompile.runtime.budget import Budget
from omnicompile.workload import Workload

DECLARATIONS = Path(__file__).parents[1] / "examples" / "omni"
MODELS = {"janus": "janus_tiny", "llama_omni": "llama_omni_tiny", "qwen3_moe_omni": "qwen3_moe_omni_tiny"}
GROUPS = 2  # micro-batches of a step, on one process one after the other
_SIZES = {"hidden_size": 64, "intermediate_size": 128}  # of the language model and the image encoder
_EXPERT = 64  # inner size
_HEAD, _ROPE = 16, {"rope_type": "default", "rope_theta": 100.0}  # angles that tell tens of places apart
_EMBEDDING = 0.5  # standard deviation of embeddings
_SAMPLES = {"text": 1, "image": 5, "video": 4, "audio": 2, "drawing": 3}  # of each task in a micro-batch
_KMEANS_STEPS, _DECODER_STEPS = 20, 150


def build_model(name: str, dtype: torch.dtype, weights: Path) -> OmniModel:
    """With the `initial_weights` that a file holds."""
    model = initial_model(name).to(dtype)
    model.load_state_dict(torch.load(weights))
    if dtype is torch.float64:
        model.set_experts_implementation("eager")  # the grouped product takes no float64
    return model


@cache
def initial_weights(name: str) -> dict[str, Tensor]:
    """Of a model whose image tokenizer knows the study's pictures, in float32: all runs begin with them."""
    model = initial_model(name)
    fit_tokenizer(model.decoder("image"))
    return model.state_dict()


def initial_model(name: str) -> OmniModel:
    """The declared model with other sizes and weights of a scale that suits them: deviations of 0.02, as transformers
    draws them, are for widths of thousands, and at a width of 64 pictures would hardly be seen through them."""
    torch.manual_seed(0)
    config = omni.read_config(DECLARATIONS / f"{MODELS[name]}.yaml")
    for part in (config.foundation, config.encoder("image").tower):
        for field, value in _SIZES.items():
            setattr(part, field, value)
    config.foundation.head_dim, config.foundation.rope_parameters = _HEAD, dict(_ROPE)
    if "moe" in name:
        config.foundation.moe_intermediate_size = _EXPERT
    model = OmniModel(config).float()
    _rescale(model)
    return model


def _rescale(model: OmniModel) -> None:
    """Trained matrices get the standard deviation 1 / sqrt(inputs)."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        matrix = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if (matrix or isinstance(module, nn.Embedding)) and module.weight.requires_grad:
            scale = module.weight[0].numel() ** -0.5 if matrix else _EMBEDDING
            nn.init.normal_(module.weight, 0.0, scale, generator)
    for name, parameter in model.named_parameters():
        if ".experts." in name:  # [experts, outputs, inputs]
            nn.init.normal_(parameter, 0.0, parameter.shape[-1] ** -0.5, generator)


def fit_tokenizer(decoder: DiscreteDecoder) -> float:
    """Give a VQ tokenizer codes that tell the study's pictures apart: its codebook becomes the centres of what its
    encoder makes of them, and its decoder learns to draw them. Returns the mean squared error of a pixel."""
    pictures = torch.stack([draw(c, s, decoder.item_shape[-1]) for c, s in NAMES]).to(decoder.dtype)
    tower = decoder.tower
    seen: list[Tensor] = []
    handle = tower.quantize.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    decoder.tokenize(pictures)
    handle.remove()
    features = seen[0].movedim(-3, -1).flatten(0, -2)
    tower.quantize.embedding.weight.data.copy_(_centres(features, decoder.codes))
    codes = decoder.tokenize(pictures)
    learned = [p for n, p in tower.named_parameters() if n.startswith(("decoder.", "post_quant_conv."))]
    for parameter in learned:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(learned, lr=3e-3)
    loss = torch.zeros(())
    for _ in range(_DECODER_STEPS):
        loss = F.mse_loss(decoder.lm_generate(codes), pictures)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    decoder.freeze()
    return loss.item()


def _centres(features: Tensor, count: int) -> Tensor:
    """Of k-means, begun at the points that are furthest from those taken before."""
    chosen = [features[0]]
    while len(chosen) < count:
        chosen.append(features[torch.cdist(features, torch.stack(chosen)).amin(1).argmax()])
    centres = torch.stack(chosen)
    for _ in range(_KMEANS_STEPS):
        nearest = torch.cdist(features, centres).argmin(1)
        for i in range(count):
            if bool((nearest == i).any()):
                centres[i] = features[nearest == i].mean(0)
    return centres


def samples(model: OmniModel, step: int, group: int) -> list[Sample]:
    """What data rank `group` trains on in a step: every task, but that a rank now and then has no picture to read or
    to draw."""
    generator = torch.Generator().manual_seed(1_000_003 * (step + 1) + group)
    lacks = {0: "drawing", 1: "image"}.get((step + 3 * group) % 8)
    found = []
    for task in tasks_of(model):
        count = 0 if task.name == lacks else _SAMPLES[task.name]
        found += [task.make(model, generator)[0] for _ in range(count)]
    return found


def processor(model: OmniModel) -> OmniProcessor:
    return OmniProcessor(model, tokenizer(model.config.special_tokens or {}))


def micro_batch(model: OmniModel, step: int, group: int) -> dict[str, Tensor]:
    return in_dtype(processor(model)(samples(model, step, group)), model.dtype)


def full_batch(model: OmniModel) -> dict[str, Tensor]:
    """A batch with every kind of item, and room for dummies in place of any: the budget."""
    generator = torch.Generator().manual_seed(0)
    found = [task.make(model, generator)[0] for task in tasks_of(model) for _ in range(_SAMPLES[task.name])]
    batch = in_dtype(processor(model)(found), model.dtype)
    length = -(-(batch["input_ids"].shape[1] + 24) // 16) * 16
    return Budget(length, None, restarts=True).fill(batch).batch


def make_plan(model: OmniModel, name: str, world: int) -> Plan:
    """FSDP and sequence parallelism over pairs of ranks, expert parallelism where there are experts; encoders and
    the tokenizer on layouts of their own."""
    sp = world // GROUPS
    mesh = Mesh(dp_shard=GROUPS, sp=sp, ep=2 if "moe" in name else 1)
    cut = Layout.SEQUENCE if sp > 1 else Layout.BATCH
    whole = Layout.REPLICATED if sp > 1 else Layout.BATCH
    text = BlockPlan(layout=cut, sp=sp, ep=mesh.ep)
    blocks = {"text": text, "vision": BlockPlan(layout=cut, sp=sp), "output_image": BlockPlan(layout=whole, sp=sp)}
    if "audio" in (model.config.encoders or []):
        blocks["audio"] = BlockPlan(layout=whole, sp=sp)
    dtype = str(model.dtype).removeprefix("torch.")
    return Plan(
        model=name, cluster=Cluster(gpus=world), workload=Workload(seq_len=256), mesh=mesh, blocks=blocks,
        param_dtype=dtype, reduce_dtype=dtype,
    )  # fmt: skip
