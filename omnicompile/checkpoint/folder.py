"""The folder of a run's checkpoints on a file system that all hosts share.

    run/step-00000100/             whole: it has a manifest, and every file that this names in its size
    run/.saving-00000200-5f3a.../  being written, or left behind by a run that was killed: never read

A checkpoint is written into a `.saving-` folder, its files and then its manifest are flushed to the disk, and the
folder is renamed, which the file system does at once or not at all.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omnicompile.errors import CheckpointError, InputError

MANIFEST = "manifest.json"
FORMAT = 1
_WHOLE = re.compile(r"step-(\d{8,})(?:-(\d+))?")
_UNFINISHED = ".saving-"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds beside its tensors.

    number: of this save in the folder, 1 for the first. parameters: whole shapes by name. buffers: names. optimizer:
    see contents.py. left_out: frozen parameters that are not in the files, with their bit sums. rng: see
    random_state.py. files: sizes in bytes.
    """

    step: int
    model: str
    parameters: dict[str, list[int]]
    buffers: list[str]
    left_out: dict[str, int]
    optimizer: dict[str, Any]
    extra: dict[str, Any]
    rng: dict[str, str]
    plan: str
    world: int
    versions: str
    number: int = 0
    files: dict[str, int] = field(default_factory=dict)
    format: int = FORMAT


@dataclass(frozen=True)
class Whole:
    """A whole checkpoint."""

    path: Path
    manifest: Manifest


@dataclass(frozen=True)
class Damaged:
    path: Path
    step: int
    fault: str


class CheckpointFolder:
    """Only rank 0 writes here, beside the tensor files of the other ranks."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def scan(self) -> tuple[list[Whole], list[Damaged]]:
        """Whole checkpoints, the last written one at the end, and damaged ones."""
        whole: list[Whole] = []
        damaged: list[Damaged] = []
        for path, step in self._candidates():
            try:
                whole.append(Whole(path, read_manifest(path)))
            except CheckpointError as error:
                damaged.append(Damaged(path, step, str(error)))
        return sorted(whole, key=lambda found: found.manifest.number), damaged

    def _candidates(self) -> list[tuple[Path, int]]:
        if not self.path.is_dir():
            return []
        named = [(path, _WHOLE.fullmatch(path.name)) for path in sorted(self.path.iterdir())]
        return [(path, int(match.group(1))) for path, match in named if match is not None]

    def find(self, step: int | None) -> tuple[Whole, list[Damaged]]:
        """The last whole checkpoint, or the last one of `step`; and newer ones that are damaged. Raises CheckpointError
        if there is none."""
        whole, damaged = self.scan()
        fitting = [found for found in whole if step is None or found.manifest.step == step]
        if fitting:
            return fitting[-1], [bad for bad in damaged if bad.step > fitting[-1].manifest.step]
        faults = [bad.fault for bad in damaged if step is None or bad.step == step]
        last = f": load step {whole[-1].manifest.step}, the last whole one" if whole else ", and there is no whole one"
        if faults:
            raise CheckpointError(f"{faults[-1]}{last}")
        of = "" if step is None else f" of step {step}"
        raise CheckpointError(f"{self.path} has no checkpoint{of}{last if step is not None else ''}")

    def begin(self, step: int) -> Path:
        """A new folder for the files of a checkpoint. Removes what killed runs have left behind."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for left in self.path.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(left, ignore_errors=True)
            place = self.path / f"{_UNFINISHED}{step:08d}-{uuid.uuid4().hex[:12]}"
            place.mkdir()
        except OSError as error:
            raise InputError(f"cannot write checkpoints to {self.path}: {error.strerror}") from error
        return place

    def commit(self, place: Path, manifest: Manifest) -> Path:
        """Make the files in `place` a whole checkpoint."""
        whole, _ = self.scan()
        files = {path.name: path.stat().st_size for path in sorted(place.iterdir())}
        number = max((found.manifest.number for found in whole), default=0) + 1
        content = asdict(manifest) | {"files": files, "number": number}
        with open(place / MANIFEST, "w", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        _flush_folder(place)
        target = self._free_name(manifest.step)
        os.rename(place, target)
        _flush_folder(self.path)
        return target

    def _free_name(self, step: int) -> Path:
        target, count = self.path / f"step-{step:08d}", 1
        while target.exists():
            count += 1
            target = self.path / f"step-{step:08d}-{count}"
        return target

    def keep(self, count: int) -> None:
        """Remove whole checkpoints but the last `count`. Damaged ones are left for a person to look at."""
        whole, _ = self.scan()
        for found in whole[:-count]:
            doomed = self.path / f"{_UNFINISHED}removed-{found.path.name}"  # so that no half removed one is ever seen
            os.rename(found.path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def discard(self, place: Path) -> None:
        shutil.rmtree(place, ignore_errors=True)


def read_manifest(path: Path) -> Manifest:
    """Of the checkpoint in `path`, when all its files are there. Raises CheckpointError naming the fault."""
    try:
        content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        manifest = Manifest(**content)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} is missing") from None
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} cannot be read ({error})") from error
    if manifest.format != FORMAT:
        raise CheckpointError(f"checkpoint {path} has format {manifest.format}, and this version reads {FORMAT}")
    for name, size in manifest.files.items():
        _require_size(path, name, size)
    return manifest


def _require_size(path: Path, name: str, size: int) -> None:
    try:
        found = (path / name).stat().st_size
    except OSError:
        raise CheckpointError(f"checkpoint {path} is damaged: {name} is missing") from None
    if found != size:
        raise CheckpointError(f"checkpoint {path} is damaged: {name} has {found:,} bytes and not {size:,}")


def require_same_shapes(path: Path, saved: Mapping[str, list[int]], own: Mapping[str, list[int]]) -> None:
    """Raises CheckpointError naming what differs between the model of a checkpoint and the present one."""
    differences = [f"it has no {name}" for name in own if name not in saved]
    differences += [f"the model has no {name}" for name in saved if name not in own]
    shapes = [name for name in own if name in saved and list(saved[name]) != list(own[name])]
    differences += [f"{name} is {saved[name]} there and {own[name]} in the model" for name in shapes]
    if differences:
        more = f", and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise CheckpointError(f"checkpoint {path} is of another model: {'; '.join(differences[:3])}{more}")


def _flush_folder(path: Path) -> None:
    """Put the names in a folder on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
