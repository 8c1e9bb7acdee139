"""Starts the processes of a run on this node, as torchrun does, and tells one cause when they fail."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omnicompile.errors import InputError
from omnicompile.train.failures import FOLDER, Cause, cause_of, read_failures

_GRACE = 600
"""Seconds that ranks have to save a checkpoint after a signal."""


@dataclass(frozen=True)
class Job:
    """processes: on this node. nodes: in the job. node: this one's number, for a rendezvous without a service; None:
    given by the rendezvous. endpoint: host:port of the first node; "" for a job of one node. name: of the job."""

    processes: int
    nodes: int = 1
    node: int | None = None
    endpoint: str = ""
    name: str = "omnicompile"

    def __post_init__(self) -> None:
        for option, value in (("--nproc", self.processes), ("--nnodes", self.nodes)):
            if value < 1:
                raise InputError(f"{option} must be at least 1, got {value}")
        if self.nodes > 1 and not self.endpoint:
            raise InputError("--nnodes needs --rdzv-endpoint HOST:PORT, the address of the first node, on every node")
        if self.endpoint and not _is_address(self.endpoint):
            raise InputError(f"--rdzv-endpoint {self.endpoint}: write it as HOST:PORT, such as node-0:29500")
        if self.node is not None and not 0 <= self.node < self.nodes:
            raise InputError(f"--node-rank must be from 0 to {self.nodes - 1}, got {self.node}")


def _is_address(text: str) -> bool:
    host, colon, port = text.rpartition(":")
    return bool(host and colon and port.isdigit())


def is_worker() -> bool:
    """Whether a launcher has started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(job: Job, arguments: Sequence[str], debug: bool = False) -> Cause | None:
    """Run `python -m omnicompile ARGUMENTS` as every rank of this node; None when all ended well, otherwise the cause.

    SIGTERM and SIGINT go on to the ranks, which have time to save a checkpoint. debug: show what the launcher logs.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    if not debug:
        logging.disable(logging.CRITICAL)  # pages of traces around the one cause
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_GRACE))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // job.processes)))
    with tempfile.TemporaryDirectory(prefix="omnicompile-failures-") as folder:
        os.environ[FOLDER] = folder
        try:
            elastic_launch(_config(job), sys.executable)("-m", "omnicompile", *arguments)
        except SignalException as stopped:
            return _stopped(int(stopped.sigval), Path(folder))
        except ChildFailedError as failed:
            codes = {rank: (failure.exitcode, failure.pid) for rank, failure in failed.failures.items()}
            return cause_of(read_failures(Path(folder)), codes)
        except Exception as error:
            raise InputError(f"the job did not come together: {' '.join(str(error).split())}{_hint(job)}") from error
        finally:
            del os.environ[FOLDER]
            logging.disable(logging.NOTSET)
    return None


def _stopped(number: int, folder: Path) -> Cause:
    """After a signal: an error of a rank on its way out, or the signal's own exit code without a word."""
    told = [failure for failure in read_failures(folder) if not failure.follows]
    return cause_of(told, {}) if told else Cause(128 + number, "")


def _config(job: Job):  # type: ignore[no-untyped-def]
    from torch.distributed.launcher.api import LaunchConfig

    static = job.nodes > 1 and job.node is not None
    configs = {"rank": job.node} if static else {}
    return LaunchConfig(
        min_nodes=job.nodes,
        max_nodes=job.nodes,
        nproc_per_node=job.processes,
        run_id=job.name,
        rdzv_backend="static" if static else "c10d",
        rdzv_endpoint=job.endpoint or "localhost:0",
        rdzv_configs=configs,
        max_restarts=0,
        monitor_interval=0.2,
    )


def _hint(job: Job) -> str:
    if job.nodes == 1:
        return ""
    return f" (is {job.endpoint} the first node, and does every node start with the same --rdzv-id?)"
