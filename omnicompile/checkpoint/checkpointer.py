"""Save a run and continue it: on the same processes, on another number of them, or under another plan."""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException

from omnicompile.checkpoint.contents import (
    Module,
    OptimizerContents,
    OptimizerTargets,
    frozen_sums,
    module_tensors,
    whole_shapes,
)
from omnicompile.checkpoint.folder import CheckpointFolder, Manifest, Whole, require_same_shapes
from omnicompile.checkpoint.random_state import random_state, set_random_state
from omnicompile.checkpoint.ranks import Ranks
from omnicompile.errors import CheckpointError, InputError
from omnicompile.runtime.agreement import installed_versions
from omnicompile.runtime.parallel_module import ParallelModule
from omnicompile.runtime.parallelize import plan_lines


@dataclass(frozen=True)
class Restored:
    """What a checkpoint held beside module, optimizer and random numbers. extra: as it was given to `save`."""

    step: int
    extra: dict[str, Any]


class Checkpointer:
    """Writes and reads checkpoints in one folder, which all hosts must share.

    All ranks call each method together, between steps. keep_last: whole checkpoints that are kept. asynchronous: `save`
    returns when the tensors are copied to host memory, and a thread writes them; at most one save is under way. frozen:
    save parameters that are not trained too; otherwise they must be there, the same, when a checkpoint is loaded.
    """

    def __init__(self, folder: Path | str, keep_last: int = 3, asynchronous: bool = True, frozen: bool = True) -> None:
        if keep_last < 1:
            raise InputError(f"keep_last must be at least 1, got {keep_last}")
        self._folder = CheckpointFolder(Path(folder))
        self._keep_last, self._asynchronous, self._frozen = keep_last, asynchronous, frozen
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="omnicompile-checkpoint")
        self._pending: Future[None] | None = None
        self._all: Ranks | None = None

    @property
    def _ranks(self) -> Ranks:
        if self._all is None:
            self._all = Ranks.start()
        return self._all

    def save(self, step: int, module: Module, optimizer: torch.optim.Optimizer, extra: Mapping[str, Any]) -> None:
        """Save model, optimizer, random numbers and `extra` (JSON-able, the same on all ranks) as step `step`.

        Raises on every rank: CheckpointError when this save, or the one before it that was still being written, has
        failed; InputError for a folder that cannot be written or an `extra` that JSON cannot hold. The checkpoints
        before it are left as they are then.
        """
        self.wait()
        with _together(module, "saving a checkpoint"):
            ranks = self._ranks
            left_out = {} if self._frozen else frozen_sums(module)
            place = ranks.first(lambda: self._folder.begin(step))

            def prepare() -> tuple[dict[str, Tensor], Manifest]:
                if not place.is_dir():
                    raise InputError(f"{place} was made by rank 0 and is not there: the folder must be on shared disks")
                return _prepare(step, module, optimizer, extra, left_out)

            try:
                tensors, manifest = ranks.agree(prepare, _same_on_all_ranks)
            except Exception:
                if ranks.rank == 0:
                    self._folder.discard(place)
                raise
            self._pending = self._write(place, tensors, manifest)
        if not self._asynchronous:
            self.wait()

    def _write(self, place: Path, tensors: dict[str, Tensor], manifest: Manifest) -> Future[None]:
        writer, group = FileSystemWriter(place), self._ranks.group
        if group is None:  # as intended; the message comes up in whichever thread saves
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        size = sum(value.numel() * value.element_size() for value in tensors.values())
        if self._asynchronous and _has_host_backend():
            # Copies the tensors before it returns: training goes on while a thread writes.
            written = dcp.async_save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)
            assert isinstance(written, Future)
            return self._thread.submit(self._finish, place, manifest, written.result, size)
        save = partial(dcp.save, tensors, storage_writer=writer, process_group=group, no_dist=group is None)
        return self._thread.submit(self._finish, place, manifest, save, size)

    def _finish(self, place: Path, manifest: Manifest, written: Callable[[], Any], size: int) -> None:
        """Make a checkpoint of the files when all ranks have written theirs, in which `written` returns. size: in
        bytes, of the whole."""
        ranks, fault = self._ranks, ""
        try:
            try:
                _plainly(written)
            except Exception as error:
                fault = _fault(error, place, size)
            if faults := [text for text in ranks.gathered(fault) if text]:
                raise CheckpointError(faults[0])
            ranks.first(lambda: str(self._folder.commit(place, manifest)))
        except Exception as error:
            if ranks.rank == 0:
                self._folder.discard(place)
            raise CheckpointError(
                f"step {manifest.step} could not be saved to {self._folder.path}: {_fault(error, place, 0)}"
            ) from error
        ranks.first(lambda: self._folder.keep(self._keep_last))

    def wait(self) -> None:
        """Until the last save is whole on the disk. Raises CheckpointError on every rank if it has failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def latest(self) -> int | None:
        """The step of the last whole checkpoint, as rank 0 sees it; None if there is none."""
        return self._ranks.first(self._latest)

    def _latest(self) -> int | None:
        whole, _ = self._folder.scan()
        return whole[-1].manifest.step if whole else None

    def load(self, module: Module, optimizer: torch.optim.Optimizer, step: int | None = None) -> Restored:
        """Restore module, optimizer and random numbers from the last whole checkpoint, or that of `step`.

        Damaged checkpoints newer than it are warned of. Raises CheckpointError on every rank for one that is damaged,
        of another model or another optimizer, naming what differs; nothing has been changed then.
        """
        self.wait()
        with _together(module, "loading a checkpoint"):
            found, faults = self._ranks.first(lambda: self._choose(step))
            for fault in faults:
                warnings.warn(f"{fault}: step {found.manifest.step} is loaded instead", stacklevel=2)
            manifest = found.manifest
            targets = self._ranks.agree(lambda: _targets(found, module, optimizer))
            _require_same_values(found, module.bit_sums(list(manifest.left_out)))
            _read(found, module_tensors(module, manifest.left_out) | targets.tensors, self._ranks.group)
            targets.apply()
        set_random_state(manifest.rng, _device(module))
        return Restored(manifest.step, manifest.extra)

    def _choose(self, step: int | None) -> tuple[Whole, list[str]]:
        found, damaged = self._folder.find(step)
        return found, [bad.fault for bad in damaged]


def _prepare(
    step: int,
    module: Module,
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, Any],
    left_out: dict[str, int],
) -> tuple[dict[str, Tensor], Manifest]:
    try:
        kept = json.loads(json.dumps(dict(extra)))
    except (TypeError, ValueError) as error:
        raise InputError(f"the `extra` of a checkpoint must be what JSON can hold: {error}") from error
    state = OptimizerContents.of(module, optimizer)
    manifest = Manifest(
        step=step,
        model=type(module.plain_model).__name__,
        parameters=whole_shapes(module),
        buffers=sorted(module.stored_buffers()),
        left_out=left_out,
        optimizer=state.facts,
        extra=kept,
        rng=random_state(_device(module)),
        plan=plan_lines(module.engine.plan) if isinstance(module, ParallelModule) else "one process",
        world=dist.get_world_size() if dist.is_initialized() else 1,
        versions=installed_versions(),
    )
    return module_tensors(module, left_out) | state.tensors, manifest


def _same_on_all_ranks(prepared: tuple[dict[str, Tensor], Manifest]) -> str:
    _, manifest = prepared
    return f"step {manifest.step}, extra {json.dumps(manifest.extra, sort_keys=True)}"


def _targets(found: Whole, module: Module, optimizer: torch.optim.Optimizer) -> OptimizerTargets:
    """Where the optimizer's state is read into, after making sure that the checkpoint fits."""
    manifest = found.manifest
    require_same_shapes(found.path, manifest.parameters, whole_shapes(module))
    own: dict[str, list[int]] = {name: [] for name in module.stored_buffers()}
    require_same_shapes(found.path, {name: [] for name in manifest.buffers}, own)
    return OptimizerTargets.of(module, optimizer, manifest.optimizer)


def _require_same_values(found: Whole, own: Mapping[str, int]) -> None:
    differ = [name for name, number in found.manifest.left_out.items() if own[name] != number]
    if differ:
        raise CheckpointError(
            f"checkpoint {found.path} was saved without frozen parameters, and {differ[0]} is not the one of that run "
            f"({len(differ)} differ): give parallelize the same base weights"
        )


def _read(found: Whole, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    reader = FileSystemReader(found.path)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            _plainly(lambda: dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=group is None))
    except Exception as error:
        raise CheckpointError(f"checkpoint {found.path} cannot be read: {error}") from error


def _device(module: Module) -> torch.device:
    return next((value.device for value in module.stored().values()), torch.device("cpu"))


def _has_host_backend() -> bool:
    """Whether async_save can be used: it asks for a CPU backend of the default group too."""
    return not dist.is_initialized() or dist.get_backend_config().find("gloo") >= 0


@contextlib.contextmanager
def _together(module: Module, what: str) -> Iterator[None]:
    """Under the watch over the other ranks, where there are any."""
    if isinstance(module, ParallelModule):
        with module.engine.mesh.watch.guard(what):
            yield
    else:
        yield


def _fault(error: Exception, place: Path, size: int) -> str:
    """In a line. size: in bytes, of what was to be written; torch does not always say that there was no room."""
    text = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
    text = " ".join(text.split())[:300]
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(place).free
        if free < size:
            return f"the disk is full: {free:,} bytes are free, the checkpoint has {size:,} ({text})"
    return text


def _plainly(work: Callable[[], Any]) -> None:
    """`work()`, its CheckpointException, which is no Exception and holds the traces of all ranks, made one error."""
    try:
        work()
    except CheckpointException as error:
        rank, (first, _) = next(iter(error.failures.items()))
        others = f" and {len(error.failures) - 1} more" if len(error.failures) > 1 else ""
        text = " ".join(str(first).split())[:300]
        raise CheckpointError(f"rank {rank}{others}: {type(first).__name__}: {text}") from error
