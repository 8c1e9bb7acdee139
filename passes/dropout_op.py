"""`omnicompile::dropout` and `omnicompile::uniform`: random numbers that are a function of a key and of an element's
place in the whole tensor, so that they do not depend on how it is cut, nor on when or how often they are computed.

Place i of a site draws the first word of Philox2x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
2011) with counter i, and is dropped where that is below 2^32 times the probability. Every site of a graph has its own
64-bit key in every forward: Philox of the forward's seed, keyed by the number of the site. Places count through the
row-major whole tensor, and on from one data rank's micro-batch to the next, as in the batch of all data ranks joined
along its first dimension.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIER, _WEYL, _ROUNDS = 0xD256D193, 0x9E3779B9, 10
_CHUNK = 1 << 22  # elements at a time, for the 64-bit integers in between


def philox(low: Tensor, high: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Philox2x32-10 of the counter (low, high): two words in [0, 2^32), as int64, for words as int64."""
    for _ in range(_ROUNDS):
        product = low * _MULTIPLIER  # wraps around; its 64 bits are those of the unsigned product
        low, high = ((product >> 32) & _WORD) ^ key ^ high, product & _WORD
        key = (key + _WEYL) & _WORD
    return low, high


def site_keys(seed: int, sites: int) -> Tensor:
    """[sites] int64: the keys of a forward's dropout sites."""
    words = torch.tensor([seed & _WORD, (seed >> 32) & _WORD])
    low, high = philox(words[0], words[1], torch.arange(sites))
    return (high << 32) | low


def places(start: int, count: int, x: Tensor, data_rank: Tensor | None, rank: Tensor | None, block: int, ranks: int
           ) -> Tensor:  # fmt: skip
    """[count] int64: where the elements `start` and on of the piece `x` are in the joined batch."""
    local = torch.arange(start, start + count, device=x.device)
    if rank is not None:
        local = local // block * (block * ranks) + rank * block + local % block
    return local if data_rank is None else local + data_rank * (x.numel() * ranks)


def words(key: Tensor, place: Tensor) -> Tensor:
    """The random word in [0, 2^32) of each place."""
    return philox(place & _WORD, ((place >> 32) ^ (key >> 32)) & _WORD, key & _WORD)[0]


def keep_scaled(x: Tensor, key: Tensor, place: Tensor, p: float) -> Tensor:
    """x / (1 - p) where it is kept, 0 elsewhere; `place` has the shape of x."""
    kept = words(key, place) >= round(p * 2**32)
    return torch.where(kept, x * (0.0 if p >= 1.0 else 1.0 / (1.0 - p)), 0.0)


@torch.library.custom_op("omnicompile::dropout", mutates_args=())
def dropout(
    x: Tensor, key: Tensor, data_rank: Tensor | None, rank: Tensor | None, p: float, block: int, ranks: int
) -> Tensor:
    """x: this rank's piece. key: 0-d int64. data_rank: 0-d int64, which micro-batch of the joined batch it is of; None
    where the batch does not enter. rank / block / ranks: of every `block * ranks` elements in a row of the whole
    tensor, this rank holds the `block` with number `rank` (0-d int64; None: the whole tensor)."""
    flat, out = x.reshape(-1), x.new_empty(x.shape)
    pieces = out.view(-1)
    for start in range(0, flat.shape[0], _CHUNK):
        part = flat[start : start + _CHUNK]
        place = places(start, part.shape[0], x, data_rank, rank, block, ranks)
        pieces[start : start + _CHUNK] = keep_scaled(part, key, place, p)
    return out


@dropout.register_fake
def _dropout_fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, key, data_rank, rank, *ctx.static = inputs
    ctx.save_for_backward(key, data_rank, rank)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The same elements are dropped and scaled: no mask is kept."""
    return torch.ops.omnicompile.dropout(grad, *ctx.saved_tensors, *ctx.static), *([None] * 6)


dropout.register_autograd(_backward, setup_context=_setup_context)


def dropout_expanded(
    x: Tensor, key: Tensor, data_rank: Tensor | None, rank: Tensor | None, p: float, block: int, ranks: int
) -> Tensor:
    """The same in plain operators, for compilers to fuse with what is around it."""
    place = places(0, x.numel(), x, data_rank, rank, block, ranks)
    return keep_scaled(x, key, place.view(x.shape), p)


@torch.library.custom_op("omnicompile::uniform", mutates_args=())
def uniform(like: Tensor, key: Tensor, data_rank: Tensor | None, rank: Tensor | None, block: int, ranks: int) -> Tensor:
    """Numbers in [0, 1) of the shape and dtype of this rank's piece `like`, without gradient. As many different ones
    as the dtype has below 1 at equal distances, up to 2^32. The other arguments: see `dropout`."""
    return uniform_expanded(like, key, data_rank, rank, block, ranks)


@uniform.register_fake
def _uniform_fake(like: Tensor, *_: Any) -> Tensor:
    return like.new_empty(like.shape)


def uniform_expanded(
    like: Tensor, key: Tensor, data_rank: Tensor | None, rank: Tensor | None, block: int, ranks: int
) -> Tensor:
    """The same in plain operators."""
    place = places(0, like.numel(), like, data_rank, rank, block, ranks)
    bits = min(32, round(-math.log2(torch.finfo(like.dtype).eps)) + 1)
    return ((words(key, place) >> (32 - bits)).to(like.dtype) * 2.0**-bits).view(like.shape)
