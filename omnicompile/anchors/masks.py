"""Which attention masks the attention operator stands for, and which a model must hand to it.

Hugging Face builds a mask for an attention implementation by a function registered under its name. A name without one
gets no mask at all: images that see each other both ways, chunks, packed or left-padded rows would all be lost.

Several samples packed into one row are told by position ids that start anew. Their mask is handed on as the bounds of
the samples, an int32 vector in place of S x S booleans, which the attention function gives to the operator. A row of
one sample alone has no such mask; in a graph for packed rows its bounds are those of one segment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from omnicompile.torch_compat import is_plain_host_tensor, outside_tracing

_PROBES = 16  # random keys that each query of a packed mask is looked at


def anchor_mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    packed: bool = False,
    **rest: Any,
) -> Tensor | None:
    """The signature of Hugging Face's mask functions, and `packed`: rows may have several samples, so that causal masks
    are always given as bounds. None where the attention operator's own causal, window and
    bidirectional masks say the same; the bounds of segments [segments + 1] where those masks hold within segments; else
    the boolean mask [batch, 1, q_length, kv_length], True where a key is seen.

    Padding at the end of a row needs no mask under causal attention: no real token sees it.
    """
    from transformers.masking_utils import sdpa_mask

    causal = allow_is_causal_skip and q_length == kv_length and q_offset == kv_offset
    bidirectional = allow_is_bidirectional_skip and local_size is None
    window = local_size is None or kv_length < local_size or _slides(mask_function, local_size, kv_length)
    square = q_length == kv_length and q_offset == kv_offset == 0 and rest.get("batch_size") == 1
    if causal and window and _unpadded(attention_mask, at_the_end=True):
        if packed and square:
            with outside_tracing():
                return torch.tensor([0, q_length], dtype=torch.int32)
        return None
    if bidirectional and _unpadded(attention_mask, at_the_end=False):
        return None
    if square and attention_mask is None and not allow_is_causal_skip and not rest.get("use_vmap"):
        with outside_tracing():
            bounds = segment_bounds(mask_function, q_length, local_size)
        if bounds is not None and len(bounds) > 2:  # one segment: a model's own pattern, empty in this batch alone
            return bounds
    # A pattern of the model's own is written for one element, and vectorized in a way that tracing does not follow.
    with outside_tracing() if rest.get("use_vmap") else contextlib.nullcontext():
        return sdpa_mask(
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            **rest,
        )


def positions_restart(positions: object) -> bool:
    """Whether position ids, [rows, tokens] or with the text's running positions as the first of four axes, begin anew
    within a row: rows of several samples."""
    if isinstance(positions, Tensor) and positions.dim() == 3 and positions.shape[0] == 4:
        positions = positions[0]
    return isinstance(positions, Tensor) and positions.dim() == 2 and bool((positions[:, 1:] == 0).any())


def is_bounds(mask: Tensor) -> bool:
    """Whether what a model hands to the attention function as its mask is `segment_bounds`."""
    return mask.dtype == torch.int32 and mask.dim() == 1


def segment_bounds(mask_function: Callable[..., Tensor], length: int, window: int | None) -> Tensor | None:
    """[segments + 1] int32, if the mask of `length` queries and keys is causal attention (of at most `window` keys)
    within consecutive segments; else None.

    Found in O(length): a token that does not see the one before it starts a segment. That the mask is as these say is
    then checked at both ends of what every query sees, just outside of them, and at random keys.
    """

    def seen(queries: Tensor, keys: Tensor) -> Tensor:
        zero = torch.zeros(1, dtype=torch.long)
        return mask_function(zero, zero, queries, keys)

    token = torch.arange(length)
    sees_previous = seen(token[1:], token[:-1])
    if not is_plain_host_tensor(sees_previous):
        return None
    starts = torch.cat([torch.zeros(1, dtype=torch.long), token[1:][~sees_previous]])
    first = starts[torch.bucketize(token, starts, right=True) - 1]
    first = first if window is None else torch.maximum(first, token - window + 1)
    generator = torch.Generator().manual_seed(0)
    for key in (token, first, first - 1, token + 1, *torch.randint(length, (_PROBES, length), generator=generator)):
        inside = (key >= 0) & (key < length)
        want = (first <= key) & (key <= token)
        if not bool((seen(token[inside], key[inside]) == want[inside]).all()):
            return None
    return torch.cat([starts, torch.tensor([length])]).to(torch.int32)


def _unpadded(mask: Tensor | None, at_the_end: bool) -> bool:
    """Whether no key is padding; at_the_end: or all of it follows the real keys. mask: [batch, keys], True if real."""
    if mask is None:
        return True
    if mask.dim() != 2 or not is_plain_host_tensor(mask):
        return False
    if at_the_end:
        return bool((mask[:, 1:] <= mask[:, :-1]).all()) and bool(mask[:, 0].all())
    return bool(mask.all())


def _slides(mask_function: Callable[..., Tensor], window: int, keys: int) -> bool:
    """Whether a local pattern is a sliding window: the query after the first `window` keys sees the `window` keys up to
    itself. (A chunked one starts anew there.)"""
    with outside_tracing():
        key = torch.arange(keys)
        zero = torch.zeros(1, dtype=torch.long)
        seen = mask_function(zero, zero, torch.full((1,), window), key)
        return is_plain_host_tensor(seen) and bool((seen == ((key > 0) & (key <= window))).all())
