"""A vision-language model in plain PyTorch, without Hugging Face: a ViT, a projector and a causal decoder (1.25 B).

    omnicompile plan examples/custom_model.py --gpus 8
    omnicompile verify examples/custom_model.py --gpus 8

Nothing in it knows of parallelism. inputs() gives the forward's arguments for one sample; it is needed only where they
cannot be guessed from the forward's signature. tiny() is for `verify`: the same model with small sizes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, TINY_VOCABULARY = 32000, 128
IMAGE_TOKEN = 0  # the placeholder in input_ids that the features of a patch replace
IMAGE_SIZE, PATCH = 336, 14
PATCHES = (IMAGE_SIZE // PATCH) ** 2


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, causal: bool) -> None:
        super().__init__()
        self.head_dim, self.causal = width // heads, causal
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, angles: Tensor | None = None) -> Tensor:
        """x [batch, tokens, width]; angles [tokens, head_dim / 2] of the rotary embedding."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=q.shape[1] != k.shape[1])
        return self.out(mixed.transpose(1, 2).flatten(2))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class VisionLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, heads, causal=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTower(nn.Module):
    def __init__(self, width: int = 1024, heads: int = 16, depth: int = 24) -> None:
        super().__init__()
        self.width = width
        self.patches = nn.Conv2d(3, width, PATCH, stride=PATCH)
        self.positions = nn.Parameter(torch.zeros(PATCHES, width))
        self.layers = nn.ModuleList(VisionLayer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [images, 3, IMAGE_SIZE, IMAGE_SIZE] -> [images, PATCHES, width]."""
        x = self.patches(pixel_values).flatten(2).transpose(1, 2) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class DecoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = Attention(width, heads, kv_heads, causal=True)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), angles)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class VisionLanguageModel(nn.Module):
    def __init__(
        self,
        vision: VisionTower,
        width: int = 2048,
        heads: int = 16,
        kv_heads: int = 8,
        hidden: int = 6144,
        depth: int = 16,
        vocabulary: int = VOCABULARY,
    ) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.vision = vision
        self.projector = nn.Sequential(nn.Linear(vision.width, width), nn.GELU(), nn.Linear(width, width))
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(DecoderLayer(width, heads, kv_heads, hidden) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids: Tensor, pixel_values: Tensor, labels: Tensor) -> Tensor:
        """input_ids, labels [batch, tokens]; pixel_values [images, 3, IMAGE_SIZE, IMAGE_SIZE] -> mean loss."""
        x = self.embedding(input_ids)
        features = self.projector(self.vision(pixel_values)).to(x.dtype)
        x = x.masked_scatter((input_ids == IMAGE_TOKEN).unsqueeze(-1), features)
        angles = self.angles(input_ids.shape[1], x.device)
        for layer in self.layers:
            x = layer(x, angles)
        logits = self.head(self.norm(x))
        targets = F.pad(labels[:, 1:], (0, 1), value=-100)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100)

    def angles(self, tokens: int, device: torch.device) -> Tensor:
        """Rotary angles [tokens, head_dim / 2]."""
        frequencies = 1e4 ** -(torch.arange(0, self.head_dim, 2, device=device) / self.head_dim)
        return torch.arange(tokens, device=device)[:, None] * frequencies


def build() -> nn.Module:
    return VisionLanguageModel(VisionTower()).to(torch.bfloat16)


def tiny() -> nn.Module:
    vision = VisionTower(width=32, heads=4, depth=2)
    return VisionLanguageModel(vision, 32, heads=4, kv_heads=2, hidden=64, depth=2, vocabulary=TINY_VOCABULARY)


def inputs(workload) -> dict[str, Tensor]:
    """One sample: text with the placeholders of its images, as many of them as fit; ids that tiny() has too."""
    wanted = 2 if workload.images is None else workload.images
    images = min(wanted, (workload.seq_len - 1) // PATCHES)
    ids = torch.randint(1, TINY_VOCABULARY, (1, workload.seq_len))
    ids[:, 1 : 1 + images * PATCHES] = IMAGE_TOKEN
    pixels = torch.zeros(images, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.bfloat16)
    return {"input_ids": ids, "pixel_values": pixels, "labels": ids.masked_fill(ids == IMAGE_TOKEN, -100)}
