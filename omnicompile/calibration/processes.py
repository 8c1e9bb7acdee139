"""Starts the ranks of a calibration: under torchrun those that are there, otherwise processes of this machine."""

from __future__ import annotations

import os
import pickle
import socket
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from omnicompile.calibration.collectives import make_ranks
from omnicompile.calibration.machine import device_of
from omnicompile.calibration.measure import Say, measure
from omnicompile.cost_model.measurements import Measurements
from omnicompile.errors import InputError

RESULT = "measurements.pickle"


def threads() -> int:
    """Of one rank, as OMP_NUM_THREADS says; 1 where it says nothing, as torchrun has it."""
    try:
        return max(1, int(os.environ.get("OMP_NUM_THREADS", "1").split(",")[0]))
    except ValueError as error:
        raise InputError(f"OMP_NUM_THREADS must be a number, got {os.environ['OMP_NUM_THREADS']!r}") from error


def number_of_ranks(asked: int | None) -> int:
    """Without torchrun: one for each GPU, or two on a CPU, where nothing is asked for. Raises InputError."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    most = gpus or (os.cpu_count() or 1)
    if asked is None:
        return gpus or min(2, most)
    if not 1 <= asked <= most:
        raise InputError(f"--nproc must be 1 to {most}, the {'GPUs' if gpus else 'cores'} of this machine, got {asked}")
    return asked


def under_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def calibrate(nproc: int | None, quick: bool, name: str, quiet: bool) -> Measurements | None:
    """What was measured; None on ranks of torchrun other than the first. Raises InputError for a wrong `nproc`."""
    if under_torchrun():
        if nproc is not None:
            raise InputError("--nproc is for a single process: torchrun has started the ranks already")
        return _rank(int(os.environ["RANK"]), quick, name, quiet)
    number = number_of_ranks(nproc)
    with tempfile.TemporaryDirectory() as folder:
        if number == 1:
            return _alone(quick, name, quiet)
        mp.spawn(_entry, (number, _free_port(), quick, name, quiet, folder), nprocs=number)
        found: Measurements = pickle.loads((Path(folder) / RESULT).read_bytes())
        return found


def _alone(quick: bool, name: str, quiet: bool) -> Measurements:
    before = torch.get_num_threads()
    torch.set_num_threads(threads())
    try:
        return measure(device_of(0), make_ranks(), quick, name, _quiet if quiet else _say)
    finally:
        torch.set_num_threads(before)


def _entry(rank: int, world: int, port: int, quick: bool, name: str, quiet: bool, folder: str) -> None:
    """What a spawned process does; the first one leaves its measurements in `folder`."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ.update(where | {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)})
    found = _rank(rank, quick, name, quiet)
    if found is not None:
        (Path(folder) / RESULT).write_bytes(pickle.dumps(found))


def _rank(rank: int, quick: bool, name: str, quiet: bool) -> Measurements | None:
    device = device_of(rank)
    torch.set_num_threads(threads())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        say: Say = _say if rank == 0 and not quiet else _quiet
        found = measure(device, make_ranks(), quick, name, say)
    finally:
        dist.destroy_process_group()
    return found if rank == 0 else None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _quiet(line: str) -> None:
    pass


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
