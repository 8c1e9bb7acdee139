"""Hand-made modules of a few hundred parameters, and their traces. S = 997 tokens, a prime like no other size."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnicompile.capture.annotate import Annotator
from omnicompile.capture.build import build_program
from omnicompile.capture.cleanup import clean
from omnicompile.capture.joint import JointGraph, needs_gradient, trace_joint
from omnicompile.capture.regions import find_regions
from omnicompile.capture.symbols import GenericSize, SizeReader
from omnicompile.capture.trace import TracedForward, trace_forward
from omnicompile.program import Op, Program, SampleShape, Sym

TOKENS, WIDTH, VOCABULARY = 997, 16, 48
PATCHES, PIXELS = 23 * 35, 12
SIZES = [GenericSize(Sym.S, TOKENS, TOKENS), GenericSize(Sym.N, PATCHES, PATCHES)]


class Layer(nn.Module):
    """Causal attention and an MLP, both with a residual."""

    def __init__(self, width: int = WIDTH, heads: int = 2, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Wide(Layer):
    """A layer of another structure."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(width)
        self.extra = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.extra(x)


class Language(nn.Module):
    """Embedding, layers, tied or untied head, mean loss."""

    def __init__(self, layers: list[nn.Module] | None = None, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(layers if layers is not None else [Layer() for _ in range(3)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.embedding(input_ids)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.embed(input_ids), labels)

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), labels.flatten())


class Seeing(Language):
    """A patch encoder whose features are added to the first tokens; `unused` takes no part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(PIXELS, WIDTH)
        self.blocks = nn.ModuleList(Layer(causal=False) for _ in range(2))
        self.projector = nn.Linear(WIDTH, WIDTH)
        self.unused = nn.Linear(WIDTH, 5)

    def forward(self, input_ids: Tensor, pixel_values: Tensor, labels: Tensor) -> Tensor:
        image = self.patch(pixel_values)
        for block in self.blocks:
            image = block(image)
        x = self.embed(input_ids)
        return self.loss(torch.cat((x[:, :PATCHES] + self.projector(image), x[:, PATCHES:]), dim=1), labels)


def text() -> dict[str, Tensor]:
    return {"input_ids": torch.zeros(1, TOKENS, dtype=torch.int64), "labels": torch.zeros(1, TOKENS, dtype=torch.int64)}


def image_and_text() -> dict[str, Tensor]:
    return text() | {"pixel_values": torch.zeros(1, PATCHES, PIXELS)}


def trace(model: nn.Module, kwargs: dict[str, Any] | None = None, repeat: bool = True) -> TracedForward:
    traced = trace_forward(model, text() if kwargs is None else kwargs, repeat=repeat)
    clean(traced.graph)
    return traced


def program_of(model: nn.Module, kwargs: dict[str, Any] | None = None, repeat: bool = True) -> Program:
    traced = trace_forward(model, text() if kwargs is None else kwargs, repeat=repeat)
    return build_program(model, traced, SIZES, SampleShape(seq_len=TOKENS), "small", "")


def reader() -> SizeReader:
    return SizeReader(SIZES, {WIDTH, VOCABULARY})


class Scored(nn.Module):
    """Wraps a function of x [1, tokens, width] and a weight into a model with a loss."""

    def __init__(self, function: Any, *weights: nn.Parameter) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(weights or [nn.Parameter(torch.ones(WIDTH, WIDTH))])

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(inputs, *self.weights).float().sum()


def joint_of(function: Any, *weights: nn.Parameter, inputs: Tensor | None = None) -> JointGraph:
    """Forward and backward of `function(x, *weights)`."""
    x = torch.zeros(1, TOKENS, WIDTH) if inputs is None else inputs
    traced = trace(Scored(function, *weights), {"inputs": x}, repeat=False)
    (region,) = find_regions(traced).regions
    value = next(n.meta["val"] for n in traced.graph.graph.find_nodes(op="placeholder") if n.name in traced.params)
    return trace_joint(traced, region, needs_gradient(traced), value.fake_mode)


def ops_of(joint: JointGraph) -> tuple[Op, ...]:
    return Annotator(joint, reader(), "").ops()
