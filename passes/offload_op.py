"""`omnicompile::offload`, `offload_wait`, `fetch`, `fetch_wait`: activations go to host memory and come back.

On a GPU copies run on a stream of their own, one after the other, through pinned memory of torch's host allocator,
which hands the same buffers out again in the next step (it rounds each up to a power of two). A wait makes the
computation wait for every copy launched so far; so a graph waits for what is under way before it launches more.

On a CPU the "device" is ordinary memory and copies are made at once. Host memory is shared anonymous memory there
(`mmap` with MAP_SHARED): the kernel counts it as RssShmem, not as RssAnon, and torch's allocator does not know it, so
that what left the device can be told from what is on it.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


def host_empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Host memory for a tensor like `x`, beside the device of `x`: pinned for a GPU, outside of torch's allocator for a
    CPU."""
    if x.device.type != "cpu":
        return torch.empty_like(x, dtype=dtype, device="cpu", pin_memory=True)
    like = torch.empty_like(x, dtype=dtype, device="meta")
    if not like.numel():
        return torch.empty_like(x, dtype=dtype)
    flat = torch.frombuffer(mmap.mmap(-1, like.numel() * like.element_size()), dtype=like.dtype)
    return flat.as_strided(like.shape, like.stride())


@cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """The stream of host copies of a GPU."""
    return torch.cuda.Stream(device)


def _copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor], device: torch.device) -> None:
    """Launch copies between a device and its host memory, behind what the device computes so far."""
    if device.type == "cpu":
        for target, source in zip(targets, sources):
            target.copy_(source)
        return
    stream = _copies(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for target, source in zip(targets, sources):
            target.copy_(source, non_blocking=True)


def _wait(tensors: Sequence[Tensor]) -> None:
    if tensors and tensors[0].device.type != "cpu":
        device = tensors[0].device
        torch.cuda.current_stream(device).wait_stream(_copies(device))


@torch.library.custom_op("omnicompile::offload", mutates_args=())
def offload(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Launch copies of `tensors` (of one device) to host memory, and return these. Their memory must not be freed
    before `offload_wait`."""
    host = [host_empty_like(x) for x in tensors]
    _copy_all(host, tensors, tensors[0].device)
    return host


@offload.register_fake
def _offload_fake(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(x, device="cpu") for x in tensors]


@torch.library.custom_op("omnicompile::offload_wait", mutates_args=())
def offload_wait(tensors: Sequence[Tensor], host: Sequence[Tensor]) -> None:
    """`tensors`, which `offload` copied to `host`, may be freed from here on."""
    _wait(tensors)


@offload_wait.register_fake
def _offload_wait_fake(tensors: Sequence[Tensor], host: Sequence[Tensor]) -> None:
    return None


@torch.library.custom_op("omnicompile::fetch", mutates_args=())
def fetch(host: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Launch copies of `host` to the device. They must not be read before `fetch_wait`."""
    tensors = [torch.empty_like(x, device=device) for x in host]
    _copy_all(tensors, host, device)
    return tensors


@fetch.register_fake
def _fetch_fake(host: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    return [torch.empty_like(x, device=device) for x in host]


@torch.library.custom_op("omnicompile::fetch_wait", mutates_args=())
def fetch_wait(tensors: Sequence[Tensor]) -> None:
    """`tensors`, which `fetch` returned, may be read from here on."""
    _wait(tensors)


@fetch_wait.register_fake
def _fetch_wait_fake(tensors: Sequence[Tensor]) -> None:
    return None


OFFLOAD = torch.ops.omnicompile.offload.default
OFFLOAD_WAIT = torch.ops.omnicompile.offload_wait.default
FETCH = torch.ops.omnicompile.fetch.default
FETCH_WAIT = torch.ops.omnicompile.fetch_wait.default

# They return nothing, and what comes after them in a graph relies on them.
torch.fx.node.has_side_effect(OFFLOAD_WAIT)
torch.fx.node.has_side_effect(FETCH_WAIT)
