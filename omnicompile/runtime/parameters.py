"""A model's parameters as this rank stores them, under the model's own names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard

from omnicompile.errors import InputError
from omnicompile.passes.rank_program import ParamSpec
from omnicompile.runtime.mesh import RuntimeMesh
from omnicompile.runtime.weights import Values

_WHOLE_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class _Branch(nn.Module):
    """A node of the tree that gives parameters their dotted names."""


def add_parameter(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Register `parameter` as `name` ("a.b.c") below `root`."""
    *path, leaf = name.split(".")
    module = root
    for part in path:
        children = dict(module.named_children())
        if part not in children:
            module.add_module(part, _Branch())
        module = module.get_submodule(part)
    module.register_parameter(leaf, parameter)


class ParameterStore:
    """Local shards by model name, with their specs: what the optimizer sees. home: where they are."""

    def __init__(self, mesh: RuntimeMesh, specs: Mapping[str, ParamSpec]) -> None:
        self.mesh = mesh
        self.home = mesh.device
        self.specs = {spec.name: spec for spec in specs.values()}
        self.local: dict[str, nn.Parameter] = {}
        self._device_meshes: dict[tuple[str, ...], DeviceMesh] = {}

    def fill(self, values: Values) -> None:
        """Take this rank's shards of all parameters."""
        values.fill(self, list(self.specs))
        self.local = {name: self.local[name] for name in self.specs}

    def part_of(self, name: str) -> tuple[slice, ...]:
        """The part of the whole tensor that this rank stores, without padding; empty where padding is all."""
        spec = self.specs[name]
        parts = [slice(0, size) for size in spec.shape]
        for shard in spec.shards:
            now = parts[shard.dim]
            chunk = -(-(now.stop - now.start) // self.mesh.size(shard.axes))
            start = min(now.start + self.mesh.coordinate(shard.axes) * chunk, now.stop)
            parts[shard.dim] = slice(start, min(start + chunk, now.stop))
        return tuple(parts)

    def take(self, name: str, value: Tensor, within: tuple[slice, ...] | None = None) -> None:
        """Store what `part_of` says of the whole tensor as this rank's shard, or a piece of it. within: where in that
        part the piece is."""
        if name not in self.local:
            spec = self.specs[name]
            self.local[name] = nn.Parameter(self.new_shard(spec), requires_grad=spec.trainable)
        place = tuple(slice(0, size) for size in value.shape) if within is None else within
        with torch.no_grad():
            self.local[name][place] = value.detach().to(self.home)

    def new_shard(self, spec: ParamSpec) -> Tensor:
        """Zeros, where shards are stored."""
        return torch.zeros(spec.local_shape(self.mesh.mesh), dtype=spec.dtype, device=self.home)

    def weights(self) -> Mapping[str, Tensor]:
        """Local shards as graphs take them, on the device."""
        return self.local

    def give_out(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Complete gradients of all shards, in the order of `local`, for the optimizer."""
        return list(gradients)

    def state_dict(self) -> dict[str, Tensor]:
        """Whole-shape DTensors over the local shards (plain tensors where nothing is cut), by the model's names."""
        return {name: self.as_dtensor(name, value.detach()) for name, value in self.local.items()}

    def as_dtensor(self, name: str, local: Tensor) -> Tensor:
        """`local`, a shard of parameter `name` (or of its gradient or a moment), as a DTensor of the whole shape."""
        spec = self.specs[name]
        if not spec.shards:
            return local
        device_mesh = self._device_mesh(tuple(shard.axes for shard in spec.shards))
        placements: list[Placement] = [Shard(shard.dim) for shard in spec.shards]
        stride = torch.empty(spec.shape, device="meta").stride()
        return DTensor.from_local(
            self._unpadded(spec, local),
            device_mesh,
            placements,
            run_check=False,
            shape=torch.Size(spec.shape),
            stride=stride,
        )

    def _device_mesh(self, axes: tuple[str, ...]) -> DeviceMesh:
        if axes not in self._device_meshes:
            self._device_meshes[axes] = self.mesh.device_mesh(axes, self.home.type)
        return self._device_meshes[axes]

    def _unpadded(self, spec: ParamSpec, local: Tensor) -> Tensor:
        """DTensor keeps no padding: the last ranks of an uneven dimension hold less."""
        for dim, part in enumerate(self.part_of(spec.name)):
            local = local.narrow(dim, 0, part.stop - part.start)
        return local

    def load_one(self, name: str, value: Tensor) -> None:
        """Take this rank's shard of a whole tensor or DTensor. Raises InputError where shapes differ."""
        spec = self.specs[name]
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if tuple(full.shape) != spec.shape:
            raise InputError(f"state dict has {name} of shape {list(full.shape)}, the model {list(spec.shape)}")
        with torch.no_grad():
            self.local[name].copy_(spec.local_of(full, self.mesh.mesh, self.mesh.rank))

    def full(self, name: str, local: Tensor) -> Tensor:
        """The whole tensor that `local` is a shard of, on every rank (a collective)."""
        value = self.as_dtensor(name, local.detach())
        return value.full_tensor() if isinstance(value, DTensor) else value

    def bit_sums(self, names: Sequence[str]) -> dict[str, int]:
        """A number for the value of each parameter, the same under every plan (a collective): the sum of its bits as
        whole numbers, modulo 2**64, to which padding adds nothing."""
        found: dict[str, int] = {}
        by_axes: dict[tuple[str, ...], list[str]] = {}
        for name in names:
            by_axes.setdefault(tuple(shard.axes for shard in self.specs[name].shards), []).append(name)
        for axes, group in sorted(by_axes.items()):
            sums = torch.stack([bit_sum(self.local[name]) for name in group]).to(self.mesh.device)
            for name in axes:
                dist.all_reduce(sums, group=self.mesh.group(name))
            found |= dict(zip(group, sums.tolist()))
        return found

    def gradient_groups(self) -> Iterator[tuple[tuple[str, ...], list[str]]]:
        """Parameters by the groups that their squared gradient norms have to be summed over."""
        found: dict[tuple[str, ...], list[str]] = {}
        for name, spec in self.specs.items():
            if spec.trainable:
                found.setdefault(tuple(shard.axes for shard in spec.shards), []).append(name)
        yield from sorted(found.items())


def bit_sum(value: Tensor) -> Tensor:
    """0-d int64."""
    return value.detach().contiguous().view(_WHOLE_NUMBERS[value.element_size()]).sum(dtype=torch.int64)


def clip_grad_norm(store: ParameterStore, max_norm: float) -> Tensor:
    """Scale gradients so that the norm over all parameters of all ranks is at most `max_norm`; returns that norm."""
    device = store.mesh.device
    total = torch.zeros((), dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
    grads: list[Tensor] = []
    for axes, names in store.gradient_groups():
        found = [g for name in names if (g := store.local[name].grad) is not None]
        square = sum((g.to(total.dtype).square().sum() for g in found), torch.zeros_like(total))
        for name in axes:
            dist.all_reduce(square, group=store.mesh.group(name))
        total = total + square
        grads += found
    norm = total.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(scale.to(grad.device, grad.dtype))
    return norm.to(torch.float32)
