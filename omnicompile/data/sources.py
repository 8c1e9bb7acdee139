"""Where samples come from: any of these gives its records by number, so that whoever needs a sample can read it."""

from __future__ import annotations

import glob
import hashlib
import json
import tarfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from omnicompile.data.policy import Policy
from omnicompile.data.sample import BadSample, kind_of
from omnicompile.errors import InputError

_EXTENSIONS = {
    "images": ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"),
    "audio": ("wav", "flac", "ogg", "mp3"),
    "videos": ("mp4", "mkv", "webm", "avi", "mov"),
}


@runtime_checkable
class Source(Protocol):
    """Records by number. fingerprint: the same for the same records in the same order, as far as is cheap to tell."""

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Raises BadSample where the record cannot be read."""
        ...

    def where(self, index: int) -> str:
        """The record's place, for messages."""
        ...


class DatasetSource:
    """A map-style `datasets.Dataset` with columns `messages` or `text`, and optionally `images`, `audio`, `videos`."""

    def __init__(self, dataset: Any, name: str = "dataset") -> None:
        import datasets

        if not isinstance(dataset, datasets.Dataset):
            raise InputError(
                f"{name} is a {type(dataset).__name__}: give a datasets.Dataset (one split, not streamed), whose "
                "samples can be read in any order"
            )
        self._dataset, self._name = _undecoded(dataset), name
        self.fingerprint = f"dataset:{len(dataset)}:{','.join(sorted(dataset.column_names))}:{_digest_ends(self)}"

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        try:
            return self._dataset[index]
        except (OSError, ValueError, RuntimeError) as error:
            raise BadSample(f"the record cannot be read: {error}") from error

    def where(self, index: int) -> str:
        return f"{self._name}[{index}]"


def _undecoded(dataset: Any) -> Any:
    """Images and audio as bytes or paths: a corrupt one then is a bad sample, and no decoder is needed."""
    import datasets

    def bare(feature: Any) -> Any:
        if isinstance(feature, datasets.Image):
            return datasets.Image(decode=False)
        if isinstance(feature, datasets.Audio):
            return datasets.Audio(decode=False)
        if isinstance(feature, datasets.List):
            return datasets.List(bare(feature.feature))
        return feature

    for name, feature in dataset.features.items():
        if repr(changed := bare(feature)) != repr(feature):
            dataset = dataset.cast_column(name, changed)
    return dataset


def _digest_ends(source: DatasetSource) -> str:
    """Of the first and the last record."""
    ends = [repr(source._dataset[i]) for i in {0, len(source) - 1} if len(source)]
    return hashlib.sha256("".join(ends).encode()).hexdigest()[:16]


class JsonLines:
    """Files of one JSON object a line. Paths of images, audio and video are relative to the file."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self._paths = [Path(path) for path in paths]
        self._places: list[tuple[int, int]] = []  # (file, offset)
        digest = hashlib.sha256()
        for number, path in enumerate(self._paths):
            offset = 0
            try:
                with path.open("rb") as file:
                    for line in file:
                        if line.strip():
                            self._places.append((number, offset))
                        digest.update(line)
                        offset += len(line)
            except OSError as error:
                raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
        self.fingerprint = f"jsonl:{digest.hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        number, offset = self._places[index]
        with self._paths[number].open("rb") as file:
            file.seek(offset)
            line = file.readline()
        try:
            record = json.loads(line)
        except ValueError as error:
            raise BadSample(f"the line is no JSON: {error}") from error
        if not isinstance(record, dict):
            raise BadSample(f"the line is a JSON {type(record).__name__}, not an object")
        folder = self._paths[number].parent
        return {k: _in_folder(v, folder) if k not in ("messages", "text") else v for k, v in record.items()}

    def where(self, index: int) -> str:
        number, offset = self._places[index]
        return f"{self._paths[number]} at byte {offset}"


def _in_folder(value: Any, folder: Path) -> Any:
    """Relative paths under `folder`."""
    if isinstance(value, str):
        return str(folder / value)
    return [_in_folder(item, folder) for item in value] if isinstance(value, list) else value


class WebShards:
    """WebDataset shards: tar files in which the members of a sample share what stands before the first dot of their
    names. `json` is the record, or `txt` its text; `jpg`, `0.png`, `wav`, ... are its media, in the order of names.

    Members are found once, when opened, and read by their offsets: that gives shards the access by number that exact
    order and resuming need, and that reading them as a stream has not.
    """

    def __init__(self, shards: Sequence[str | Path]) -> None:
        self._shards = [Path(shard) for shard in shards]
        digest = hashlib.sha256()
        self._samples: list[tuple[int, str, dict[str, tuple[int, int]]]] = []
        for number, path in enumerate(self._shards):
            members = _members(path)
            digest.update(repr(list(members.items())).encode())
            self._samples += [(number, key, fields) for key, fields in members.items()]
        self.fingerprint = f"webdataset:{digest.hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        number, _, fields = self._samples[index]
        with self._shards[number].open("rb") as file:
            parts = {}
            for name, (offset, size) in fields.items():
                file.seek(offset)
                parts[name] = file.read(size)
        return _record(parts)

    def where(self, index: int) -> str:
        number, key, _ = self._samples[index]
        return f"{self._shards[number]}:{key}"


def _members(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """sample -> extension -> (offset, size) in an uncompressed tar."""
    from webdataset.tariterators import base_plus_ext

    found: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                key, extension = base_plus_ext(member.name)
                if member.isfile() and key is not None and not Path(member.name).name.startswith("."):
                    fields = found.setdefault(key, {})
                    if extension.lower() in fields:
                        raise InputError(f"{path}: sample {key} has {extension} twice")
                    fields[extension.lower()] = (member.offset_data, member.size)
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"{path} cannot be read as an uncompressed tar file: {error}") from error
    return found


def _record(parts: Mapping[str, bytes]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    if "json" in parts:
        try:
            record = json.loads(parts["json"])
        except ValueError as error:
            raise BadSample(f"its json cannot be read: {error}") from error
        if not isinstance(record, dict):
            raise BadSample(f"its json is a {type(record).__name__}, not an object")
    if "txt" in parts:
        record["text"] = parts["txt"].decode(errors="replace")
    for name, extensions in _EXTENSIONS.items():
        media = [parts[field] for field in sorted(parts) if field.rsplit(".", 1)[-1] in extensions]
        if media:
            record[name] = media
    return record


class Records:
    """Records in memory."""

    def __init__(self, records: Sequence[Mapping[str, Any]], name: str = "records") -> None:
        self._records, self._name = records, name

    @cached_property
    def fingerprint(self) -> str:
        ends = repr([self._records[i] for i in {0, len(self) - 1}] if len(self) else [])
        return f"records:{len(self)}:{hashlib.sha256(ends.encode()).hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self._records[index]

    def where(self, index: int) -> str:
        return f"{self._name}[{index}]"


def open_source(given: Any) -> Source:
    """A source of anything that has samples: a `datasets.Dataset`, a list of records, one of the classes above; or a
    path: a folder that `datasets` saved, `.jsonl` or `.tar` files (a list, a pattern with `*`, or braces as WebDataset
    takes them). Raises InputError where there is no sample in it."""
    source = _open(given)
    if not len(source):
        raise InputError(
            f"{given if isinstance(given, str | Path) else 'the dataset'} is empty: there are no samples in it"
        )
    return source


def _open(given: Any) -> Source:
    if isinstance(given, str | Path):
        return _open_paths(_expanded(str(given)))
    if isinstance(given, list | tuple):
        if given and all(isinstance(item, str | Path) for item in given):
            return _open_paths([path for item in given for path in _expanded(str(item))])
        return Records(given)
    if isinstance(given, Source):
        return given
    return DatasetSource(given)


def _expanded(path: str) -> list[str]:
    from webdataset.shardlists import expand_urls

    found = [name for part in expand_urls(path) for name in (sorted(glob.glob(part)) if "*" in part else [part])]
    if not found:
        raise InputError(f"no file matches {path}")
    return found


def _open_paths(paths: list[str]) -> Source:
    endings = {Path(path).suffix.lower() for path in paths}
    if endings <= {".jsonl", ".ndjson"}:
        return JsonLines(paths)
    if endings == {".tar"}:
        return WebShards(paths)
    if len(paths) == 1 and Path(paths[0]).is_dir():
        return _saved(paths[0])
    if len(paths) == 1 and not Path(paths[0]).exists():
        raise InputError(f"{paths[0]} does not exist")
    raise InputError(f"{', '.join(paths[:3])}: give .jsonl files, .tar files, or one folder saved by `datasets`")


def _saved(folder: str) -> Source:
    import datasets

    try:
        return DatasetSource(datasets.load_from_disk(folder), folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is no folder that `datasets` saved (save_to_disk): {error}") from error


def first_kind(source: Source, bad: Policy) -> str:
    """ "messages" or "text": of the first record that can be read, the form that all of them must have."""
    for number in range(len(source)):
        try:
            record = source[number]
        except BadSample as reason:
            if bad is Policy.REFUSE:
                raise InputError(
                    f"{source.where(number)}: {reason}; mend or remove it, or skip such samples"
                ) from reason
            continue
        return kind_of(record, source.where(number))
    raise InputError(f"none of the {len(source):,} samples can be read")
