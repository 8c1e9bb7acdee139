"""Forked processes that save checkpoints of a small model whose values tell the step."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from omnicompile.checkpoint.checkpointer import Checkpointer
from omnicompile.runtime.plain_module import PlainModule

FORK = multiprocessing.get_context("fork")  # starting Python and torch anew would take most of the time


class ShardedModule(PlainModule):
    """Each rank holds its rows of every parameter of a model of `rows` rows."""

    def __init__(self, rows: int, columns: int = 64) -> None:
        super().__init__(nn.ParameterDict({"a": torch.zeros(rows, columns), "b": torch.zeros(rows, 3)}))
        self.mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def as_whole(self, name: str, local: Tensor) -> Tensor:
        return DTensor.from_local(local.detach(), self.mesh, [Shard(0)], run_check=False)


def whole_module(rows: int, columns: int = 64) -> PlainModule:
    return PlainModule(nn.ParameterDict({"a": torch.zeros(rows, columns), "b": torch.zeros(rows, 3)}))


def set_to(module: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Give parameters and moments the value of the step."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(float(step))
            optimizer.state[parameter]["exp_avg"].fill_(float(step))


def is_at(module: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> bool:
    values = [v for p in module.parameters() for v in (p.detach(), optimizer.state[p]["exp_avg"])]
    return all(bool((value == step).all()) for value in values)


def save_for_ever(module: PlainModule, folder: Path, first: int) -> None:
    """Steps from `first` on, until killed. Each changes the values while the last one is being written."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0)
    checkpointer = Checkpointer(folder, keep_last=2)
    step = first
    while True:
        set_to(module, optimizer, step)
        checkpointer.save(step, module, optimizer, {"step": step})
        step += 1


def _child(rank: int, world: int, store: str, work: Callable[..., Any], args: tuple[Any, ...], results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        results.put((rank, work(rank, *args)))
    except BaseException as error:
        results.put((rank, f"{type(error).__name__}: {error}"))
    finally:
        results.close()
        results.join_thread()
        os._exit(0)


class Children:
    """`work(rank, *args)` in forked gloo processes."""

    def __init__(self, world: int, store: Path, work: Callable[..., Any], *args: Any) -> None:
        self.results: Any = FORK.Queue()
        entries = [(rank, world, str(store), work, args, self.results) for rank in range(world)]
        self.processes = [FORK.Process(target=_child, args=entry, daemon=True) for entry in entries]
        for process in self.processes:
            process.start()

    def result(self, timeout: float = 60.0) -> tuple[int, Any]:
        return self.results.get(timeout=timeout)

    def all(self) -> list[Any]:
        found = dict(self.result() for _ in self.processes)
        self.end()
        return [found[rank] for rank in range(len(self.processes))]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def wait_for(ready: Callable[[], bool], timeout: float = 60.0) -> None:
    end = time.monotonic() + timeout
    while not ready():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)
