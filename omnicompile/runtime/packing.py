"""Which rank of a sequence-parallel group works on which images, under layout "images"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omnicompile.capture.inputs.types import StatesInputs
from omnicompile.capture.regions import modality_of_input
from omnicompile.errors import InputError
from omnicompile.passes.rank_program import RankProgram, check_alignment
from omnicompile.plan import Layout, Plan

_TRIES = 20_000


def pack(sizes: Sequence[int], ranks: int, capacity: int) -> list[list[int]] | None:
    """Images by rank, each rank's in the order of the batch, such that no rank has more than `capacity` patches.

    Largest first onto the fullest rank that has room, and back where that leads nowhere. None if there is no way, or
    none was found in a bounded number of steps. The same answer for the same arguments, on every rank.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    rooms = [capacity] * ranks
    chosen: list[int] = []
    tries = 0

    def place(number: int) -> bool:
        nonlocal tries
        if number == len(order):
            return True
        size = sizes[order[number]]
        seen: set[int] = set()
        for rank in sorted(range(ranks), key=lambda r: (rooms[r], r)):
            if rooms[rank] < size or rooms[rank] in seen:
                continue
            seen.add(rooms[rank])  # ranks with equal room are alike
            tries += 1
            if tries > _TRIES:
                return False
            rooms[rank] -= size
            chosen.append(rank)
            if place(number + 1):
                return True
            chosen.pop()
            rooms[rank] += size
        return False

    if not place(0):
        return None
    found: list[list[int]] = [[] for _ in range(ranks)]
    for image, rank in zip(order, chosen):
        found[rank].append(image)
    return [sorted(images) for images in found]


@dataclass(frozen=True)
class Dealing:
    """Images in the order in which ranks work on them (indices into the batch's) and the patches of each image of the
    batch."""

    order: tuple[int, ...]
    sizes: tuple[int, ...]

    @staticmethod
    def of(by_rank: Sequence[Sequence[int]], sizes: Sequence[int]) -> Dealing:
        return Dealing(tuple(image for images in by_rank for image in images), tuple(sizes))

    def way_back(self, rows: int) -> Tensor:
        """[rows] int64: where the rows of features, in the order of the batch, are among those in the ranks' order;
        `rows` divides the number of patches."""
        per_row = sum(self.sizes) // rows
        starts, at = {}, 0
        for image in self.order:
            starts[image] = at
            at += self.sizes[image] // per_row
        return torch.cat([torch.arange(size // per_row) + starts[i] for i, size in enumerate(self.sizes)])

    def dealt(self, batch: Mapping[str, Any], pixels: str, grid: str) -> dict[str, Any]:
        """The batch with its images in the ranks' order."""
        patches = batch[pixels].split(self.sizes)
        return {
            **batch,
            pixels: torch.cat([patches[image] for image in self.order]),
            grid: batch[grid][torch.tensor(self.order)],
        }


def with_spans(batch: Mapping[str, Any], lengths: Sequence[int], ids: str, kinds: str, token: int) -> dict[str, Any]:
    """The batch with text in which images of `lengths` placeholder tokens stand in this order, one text token before
    each: for the model's own code that looks at images and text together, where only what it makes of the images is
    used. Raises InputError where they do not fit into the rows."""
    shown = batch["attention_mask"] if isinstance(batch.get("attention_mask"), Tensor) else torch.ones_like(batch[ids])
    places = [row.nonzero().flatten().tolist() for row in shown]
    new_ids, new_kinds = torch.zeros_like(batch[ids]), torch.zeros_like(batch[kinds])
    row, at = 0, 1
    for length in lengths:
        while row < len(places) and at + length > len(places[row]):
            row, at = row + 1, 1
        if row == len(places):
            raise InputError(
                "layout 'images' takes the images of this batch in another order, in which they do not fit into its "
                f"{len(places)} rows: give one row a micro-batch, or use layout 'sequence'"
            )
        span = places[row][at : at + length]
        new_ids[row, span], new_kinds[row, span] = token, 1
        at += length + 1
    return {**batch, ids: new_ids, kinds: new_kinds}


def image_ranks(plan: Plan, model: nn.Module) -> int:
    """The number of ranks that whole packed images are dealt out to. Blocks of items of one size (clips, images to be
    produced) may be dealt out too, which needs nothing here."""
    packed = {"vision"}
    if isinstance(model, StatesInputs):
        packed = {modality_of_input(name) for name, items in model.placeholders().items() if items.grid}
    dealt_out = any(plan.blocks[b].layout is Layout.IMAGES and plan.blocks[b].sp > 1 for b in packed & set(plan.blocks))
    return plan.mesh.sp if dealt_out else 1


def needs_dealing(program: RankProgram) -> bool:
    return any(spec.kind == "order" for spec in program.inputs.values())


def dealt_values(program: RankProgram, dealing: Dealing, dealt: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The program's inputs that go by the ranks' order of images, by placeholder. dealt: those of the batch in that
    order. Raises InputError if segments of the encoder are not whole on a rank."""
    if not needs_dealing(program):
        return {}
    check_alignment(program, dealt)
    found = {name: dealt[name] for name, spec in program.inputs.items() if spec.packed}
    orders = {name: int(spec.name) for name, spec in program.inputs.items() if spec.kind == "order"}
    return found | {name: dealing.way_back(rows) for name, rows in orders.items()}
