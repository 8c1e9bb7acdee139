"""Every listed kind of model under every layout that it can have: loss and all gradients equal the single process.

Whole images on each rank (layout images), several rows, cross attention and dropout are in test_parity.py; the same
models on real processes in tests/runtime/test_four_processes.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from torch import Tensor, nn

from omnicompile.plan import BlockPlan, Layout, Mesh, Sharding

from .models import (
    dense_model,
    image_batches,
    latent_mixture_model,
    mixture_model,
    stacked_mixture_vl_model,
    text_batch,
    vision_language_model,
    windowed_model,
)
from .omni_models import fixed_image_batch, fixed_image_model, omni_batch, omni_mixture_model, omni_model
from .parity import run_parity
from .plain_models import plain_model

TOLERANCE = 1e-5
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """encoders: names of their blocks, as they occur in module paths. experts: whether it has any."""

    build: Callable[[], nn.Module]
    batches: Callable[[int], list[Batch]]
    encoders: tuple[str, ...] = ()
    experts: bool = False


@dataclass(frozen=True)
class Way:
    """mesh: with the ep that a model with experts has. mixed: encoders have another sharding and layout."""

    mesh: Mesh
    sharding: Sharding = Sharding.FSDP
    encoder: Layout = Layout.SEQUENCE
    mixed: bool = False

    def blocks(self, kind: Kind) -> dict[str, BlockPlan]:
        cut = self.mesh.sp > 1
        layout = Layout.SEQUENCE if cut else Layout.BATCH
        found = {"text": BlockPlan(self.sharding, layout, sp=self.mesh.sp, ep=self.mesh.ep)}
        for number, name in enumerate(kind.encoders):
            block = BlockPlan(self.sharding, self.encoder if cut else layout, sp=self.mesh.sp)
            if self.mixed and number == 0:
                block = BlockPlan(Sharding.REPLICATE, Layout.REPLICATED)
            elif self.mixed:
                block = BlockPlan(Sharding.HSDP, Layout.SEQUENCE, sp=self.mesh.sp)
            found[name] = block
        return found


def _texts(count: int) -> list[Batch]:
    return [text_batch(seed) for seed in range(count)]


def _omni(mixture: bool) -> Callable[[int], list[Batch]]:
    return lambda count: [omni_batch(seed, mixture) for seed in range(count)]


KINDS = {
    "dense": Kind(dense_model, _texts),
    "hand-written": Kind(plain_model, _texts),
    "mixture": Kind(mixture_model, _texts, experts=True),
    "latent mixture": Kind(latent_mixture_model, _texts, experts=True),
    "vision": Kind(vision_language_model, image_batches, ("visual",)),
    "windowed": Kind(windowed_model, image_batches, ("visual",)),
    "stacked mixture": Kind(stacked_mixture_vl_model, image_batches, ("visual",), True),
    "fixed images": Kind(
        fixed_image_model, lambda count: [fixed_image_batch(seed) for seed in range(count)], ("vision_model",)
    ),
    "omni": Kind(omni_model, _omni(False), ("visual", "audio_tower")),
    "omni mixture": Kind(omni_mixture_model, _omni(True), ("visual", "audio_tower"), True),
}
WAYS = {
    "fsdp": Way(Mesh(dp_shard=4)),
    "hsdp": Way(Mesh(dp_replicate=2, dp_shard=2), Sharding.HSDP),
    "sp 2": Way(Mesh(sp=2)),
    "sp 4": Way(Mesh(sp=4)),  # twice the number of key heads of most
    "ep 2": Way(Mesh(dp_shard=2, ep=2)),
    "ep 4": Way(Mesh(dp_shard=4, ep=4)),
    "fsdp sp": Way(Mesh(dp_shard=2, sp=2)),
    "fsdp sp ep": Way(Mesh(dp_shard=2, sp=2, ep=2)),
    "hsdp sp ep on 8": Way(Mesh(dp_replicate=2, dp_shard=2, sp=2, ep=2), Sharding.HSDP),
    "replicated encoder": Way(Mesh(dp_shard=2, sp=2), encoder=Layout.REPLICATED),
    "mixed": Way(Mesh(dp_shard=2, sp=2), mixed=True),
}


def _applies(kind: Kind, name: str) -> bool:
    if name in ("ep 2", "ep 4", "fsdp sp ep"):
        return kind.experts
    return bool(kind.encoders) or name not in ("replicated encoder", "mixed")


PAIRS = [(kind, way) for kind in KINDS for way in WAYS if _applies(KINDS[kind], way)]


@pytest.mark.slow
@pytest.mark.parametrize("kind, way", PAIRS)
def test_equal_to_one_process(kind: str, way: str) -> None:
    model, found = KINDS[kind], WAYS[way]
    mesh = found.mesh
    if not model.experts:
        mesh = Mesh(mesh.dp_replicate, mesh.dp_shard, mesh.sp)
        found = Way(mesh, found.sharding, found.encoder, found.mixed)
    result = run_parity(model.build(), model.batches(mesh.data_ranks), mesh, found.blocks(model))
    name, worst = result.worst
    print(f"{kind}, {way}: loss {result.loss_error:.1e}, gradient {worst:.1e} ({name})")
    assert result.loss_error < TOLERANCE
    assert worst < TOLERANCE, f"{name}: {worst:.1e}"
