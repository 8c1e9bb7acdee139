"""One rank of a job in which something goes wrong: `python failing_rank.py CASE`, with torchrun's variables set.

Prints "error: TYPE: MESSAGE" for what it is told; an error that it does not catch ends it, as it ends a user's program.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import omnicompile
from omnicompile.plan import Mesh, Sharding
from omnicompile.runtime import parallelize as runtime

sys.path.insert(0, str(Path(__file__).parent.parent))
from tiny_models import make_plan, text_batch

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
FAULTY = 1


class Model(nn.Module):
    def __init__(self, seed: int = 0, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.head = nn.Embedding(128, width), nn.Linear(width, 128)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.embedding(input_ids))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class Counting(Model):
    """Changes a buffer in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        self.seen.add_(1)
        return super().forward(input_ids, labels) + 0 * self.seen


def distributed(model: nn.Module | None = None, sharding: Sharding = Sharding.FSDP, **options: Any) -> Any:
    plan = make_plan(("text",), Mesh(dp_shard=WORLD), sharding)
    options = {"example_batch": text_batch(0), "device_type": "cpu"} | options
    return omnicompile.parallelize(model or Model(), plan, **options)


def step(module: Any, number: int, **options: Any) -> None:
    loss = module(**text_batch(number * WORLD + RANK, **options))
    loss = loss.loss if hasattr(loss, "loss") else loss
    loss.backward()


def told(what: str, function: Any, *args: Any, **options: Any) -> None:
    try:
        function(*args, **options)
    except Exception as error:
        print(f"{what}: {type(error).__name__}: {error}", flush=True)


def killed() -> None:
    module = distributed()
    step(module, 0)
    if RANK == FAULTY:
        os.kill(os.getpid(), signal.SIGKILL)
    step(module, 1)


def raises() -> None:
    """In the user's own code, between two steps."""
    module = distributed()
    step(module, 0)
    if RANK == FAULTY:
        raise ValueError("the data loader has no more samples")
    step(module, 1)


def caught() -> None:
    """A rank fails within a step and lives on, while the others wait in a collective."""
    module = distributed()
    step(module, 0)
    if RANK == FAULTY:
        module.engine.reduce_losses = out_of_memory
        told("first", step, module, 1)
        told("again", step, module, 2)
        time.sleep(600)
    step(module, 1)


def out_of_memory(*_: object) -> Tensor:
    raise MemoryError("12 GiB more are needed")


def before() -> None:
    """A rank that never comes to parallelize."""
    torch.distributed.init_process_group("gloo")
    if RANK == FAULTY:
        os._exit(3)
    distributed(timeout=30.0)


def differ() -> None:
    """Each time something else is different on one rank; all go on after each error, and train at the end."""
    odd = RANK == FAULTY
    told("plan", distributed, sharding=Sharding.REPLICATE if odd else Sharding.FSDP)
    told("model", distributed, Model(width=24 if odd else 16))
    told("weights", distributed, Model(seed=int(odd)))
    told("example", distributed, example_batch=text_batch(0, length=48 if odd else 32))
    told("options", distributed, segments=8 if odd else 9)
    found = runtime.installed_versions
    runtime.installed_versions = lambda: found().replace("torch 2", "torch 3") if odd else found()
    told("versions", distributed)
    runtime.installed_versions = found
    module = distributed()
    told("rows", step, module, 0, rows=2 if odd else 1)
    told("long", step, module, 0, length=40 if odd else 32)
    batch = text_batch(RANK)
    told("dtype", lambda: module(**(batch | {"labels": batch["labels"].int()} if odd else batch)))
    told("keys", lambda: module(**({"input_ids": batch["input_ids"]} if odd else batch)))
    told("targets", module.count_targets, [text_batch(0, length=40 if odd else 32)])
    told("buffer", distributed, Counting())
    step(module, 1)
    print("trained: on", flush=True)


CASES = {function.__name__: function for function in (killed, raises, caught, before, differ)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    CASES[sys.argv[1]]()
