"""Cut a sample that is over the budget into parts that fit: between tokens, never within an image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from omnicompile.data.budget import Budget, Size
from omnicompile.data.encode import Encoded
from omnicompile.data.sample import BadSample

_PIXELS, _GRID, _IMAGE = "pixel_values", "image_grid_thw", 1


@dataclass(frozen=True)
class _Piece:
    """What is not cut: a token of text, or an image with its placeholders. start, end: tokens."""

    start: int
    end: int
    patches: int = 0

    @property
    def size(self) -> Size:
        return Size(self.end - self.start, (self.patches,) if self.patches else ())


def split(encoded: Encoded, budget: Budget) -> list[Encoded]:
    """`encoded` in as few consecutive parts as fit. The first token of each part is no target: what it would be
    predicted from is in the part before. Raises BadSample where an image alone is over the budget, and for features
    other than packed images, whose places in the text are not known."""
    unknown = sorted(set(encoded.features) - ({_PIXELS, _GRID} if _GRID in encoded.features else set()))
    if unknown:
        raise BadSample(
            f"it is over the budget and cannot be split: it has {', '.join(unknown)} besides text and images"
        )
    parts: list[list[_Piece]] = [[]]
    total = (0,) * len(budget.room)
    for piece in _pieces(encoded, budget.merge):
        needs = budget.needs(piece.size)
        if not budget.holds(piece.size):
            raise BadSample(f"one image of it is over the budget: {budget.excess(piece.size)}")
        # Pieces are no samples: the one segment of text that the part is counts once.
        needs = (*needs[:-2], 0, needs[-1])
        more = tuple(a + b for a, b in zip(total, needs))
        over = any(a > b for a, b in zip(more, budget.room))
        if parts[-1] and (over or not (piece.patches == 0 or budget.deals(p.size for p in (*parts[-1], piece)))):
            parts.append([])
            more = needs
        parts[-1].append(piece)
        total = more
    return list(_cut(encoded, parts))


def _pieces(encoded: Encoded, merge: int) -> Iterator[_Piece]:
    grid = encoded.features.get(_GRID)
    patches = iter([] if grid is None else grid.prod(-1).tolist())
    kinds, at = encoded.kinds.tolist(), 0
    while at < len(kinds):
        if kinds[at] != _IMAGE:
            yield _Piece(at, at + 1)
            at += 1
            continue
        size = next(patches, 0)
        end = at + size // merge**2
        if end == at or any(kind != _IMAGE for kind in kinds[at:end]) or end > len(kinds):
            raise BadSample("its placeholders of images do not match its image_grid_thw")
        yield _Piece(at, end, size)
        at = end


def _cut(encoded: Encoded, parts: list[list[_Piece]]) -> Iterator[Encoded]:
    image = row = 0
    for pieces in parts:
        start, end = pieces[0].start, pieces[-1].end
        images, rows = sum(p.patches > 0 for p in pieces), sum(p.patches for p in pieces)
        features = {}
        if images:
            features = {
                _PIXELS: encoded.features[_PIXELS][row : row + rows],
                _GRID: encoded.features[_GRID][image : image + images],
            }
        image, row = image + images, row + rows
        yield Encoded(encoded.ids[start:end], encoded.labels[start:end], encoded.kinds[start:end], features)
