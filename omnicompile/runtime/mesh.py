"""The ranks of a plan's mesh as process groups, found by the axes they span."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from omnicompile.errors import InputError, PlanError
from omnicompile.passes.rank_program import axis_coordinate, axis_size, group_ranks
from omnicompile.plan import Mesh
from omnicompile.runtime.watch import Watch

TIMEOUT = 600.0


@dataclass
class RuntimeMesh:
    """This process's place in the mesh, and its process group for every axes string (see passes/rank_program).

    control: a gloo group of all ranks for small host-side exchanges, which never wait for a device. watch: over the
    other ranks. timeout: of a collective, in seconds.
    """

    mesh: Mesh
    rank: int
    device: torch.device
    control: dist.ProcessGroup
    watch: Watch
    timeout: float = TIMEOUT
    groups: dict[str, dist.ProcessGroup] = field(default_factory=dict)

    def group(self, axes: str) -> dist.ProcessGroup:
        """The group over `axes`. The first request makes it, which all ranks must do together."""
        if axes not in self.groups:
            self.groups[axes] = self._make(axes)
        return self.groups[axes]

    def names(self, axes: set[str]) -> dict[str, str]:
        return {name: self.group(name).group_name for name in sorted(axes)}

    def size(self, axes: str) -> int:
        return axis_size(self.mesh, axes)

    def coordinate(self, axes: str) -> int:
        return axis_coordinate(self.mesh, axes, self.rank)

    def device_mesh(self, axes: tuple[str, ...], device_type: str | None = None) -> DeviceMesh:
        """A DeviceMesh with one dimension per axes string, of the ranks that differ from this one in them only.
        device_type: of its tensors, if not this rank's device."""
        kind = device_type or self.device.type
        ranks = [list(group_ranks(self.mesh, name, self.rank)) for name in axes]
        groups = [self.group(name) for name in axes]
        if len(axes) == 1:
            return DeviceMesh.from_group(groups[0], kind, mesh_dim_names=(_dim_name(axes[0]),))
        outer, inner = ranks
        grid = [[self._at(axes, a, b) for b in range(len(inner))] for a in range(len(outer))]
        return DeviceMesh.from_group(groups, kind, mesh=torch.tensor(grid), mesh_dim_names=tuple(map(_dim_name, axes)))

    def _at(self, axes: tuple[str, ...], outer: int, inner: int) -> int:
        """The rank at place `outer` of axes[0] whose place in axes[1] is `inner`, all else as here."""
        through = group_ranks(self.mesh, axes[0], self.rank)[outer]
        return group_ranks(self.mesh, axes[1], through)[inner]

    def _make(self, axes: str) -> dist.ProcessGroup:
        world = dist.get_world_size()
        if axis_size(self.mesh, axes) == world:
            return dist.group.WORLD
        mine: dist.ProcessGroup | None = None
        for ranks in sorted({group_ranks(self.mesh, axes, rank) for rank in range(world)}):
            group = dist.new_group(list(ranks), timeout=timedelta(seconds=self.timeout))
            if self.rank in ranks:
                mine = group
        assert mine is not None
        return mine


def _dim_name(axes: str) -> str:
    return axes.replace(",", "_")


def pick_device(device_type: str | None) -> torch.device:
    """The device of this process: cuda:<local rank> where there is a GPU and nothing else is asked for."""
    kind = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise InputError("device_type is 'cuda', but torch sees no GPU: use device_type='cpu'")
        index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        return torch.device("cuda", index)
    if kind != "cpu":
        raise InputError(f"device_type must be 'cuda' or 'cpu', got {kind!r}")
    return torch.device("cpu")


def start_processes(device_type: str | None, timeout: float = TIMEOUT) -> torch.device | None:
    """Start torch.distributed under torchrun if nobody has. Returns this process's device, None for a single one."""
    device = pick_device(device_type)
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            return None
        dist.init_process_group(_backend(device), timeout=timedelta(seconds=timeout))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def start_alone(device: torch.device, timeout: float = TIMEOUT) -> torch.device:
    """Start torch.distributed for this process alone, which no launcher has started."""
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    dist.init_process_group(_backend(device), store=store, rank=0, world_size=1, timeout=timedelta(seconds=timeout))
    return device


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def control_group(timeout: float = TIMEOUT) -> dist.ProcessGroup:
    """A group of all ranks for exchanges on the host."""
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))


def start_watch() -> Watch:
    """All ranks start one together."""
    store, rank = dist.group.WORLD.get_group_store(), dist.get_rank()
    number = store.add(f"omnicompile/watches/{rank}", 1)
    return Watch(dist.PrefixStore(f"omnicompile/watch{number}", store), rank, dist.get_world_size())


def build_mesh(mesh: Mesh, device_type: str | None = None, timeout: float = TIMEOUT) -> RuntimeMesh:
    """Set up for the ranks of `mesh`. Raises PlanError when the number of processes is not the mesh's."""
    device = start_processes(device_type, timeout)
    if device is None and mesh.world == 1:
        device = start_alone(pick_device(device_type), timeout)
    if device is None:
        raise PlanError(
            f"the plan is for {mesh.world} processes, and this is a single one: start it with "
            f"`torchrun --nproc-per-node {mesh.world} ...`"
        )
    world = dist.get_world_size()
    if world != mesh.world:
        raise PlanError(
            f"the plan is for {mesh.world} processes, and there are {world}: start `torchrun --nproc-per-node "
            f"{mesh.world}`, or plan for {world} GPUs"
        )
    watch = start_watch()
    with watch.guard("parallelize"):
        return RuntimeMesh(mesh, dist.get_rank(), device, control_group(timeout), watch, timeout)
