"""A folder of safetensors as Hugging Face's save_pretrained writes it, read tensor by tensor and part by part."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from omnicompile.errors import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class SafetensorsFolder:
    """One file is open (mapped into memory) at a time. read_bytes: of what has been read so far."""

    def __init__(self, path: Path | str) -> None:
        """Raises InputError when there are no such files, or one that the index names is missing."""
        self.path = Path(path)
        self.read_bytes = 0
        self._files = self._found()
        self._open: tuple[str, Any] | None = None
        self._shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for file in sorted(set(self._files.values())):
            self._learn(file)

    def _found(self) -> dict[str, str]:
        """File by key."""
        if (self.path / INDEX).is_file():
            try:
                found = dict(json.loads((self.path / INDEX).read_text(encoding="utf-8"))["weight_map"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise InputError(f"{self.path / INDEX} cannot be read: {error!r}") from error
            missing = sorted({name for name in found.values() if not (self.path / name).is_file()})
            if missing:
                raise InputError(f"{self.path / INDEX} names {missing[0]}, which is not there ({len(missing)} missing)")
            return found
        if (self.path / SINGLE).is_file():
            with self._opened(SINGLE) as file:
                return dict.fromkeys(file.keys(), SINGLE)
        raise InputError(f"{self.path} has neither {SINGLE} nor {INDEX}: give a folder that save_pretrained wrote")

    def _opened(self, name: str) -> Any:
        try:
            return safe_open(self.path / name, framework="pt")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.path / name} cannot be read: {error}") from error

    def _learn(self, name: str) -> None:
        with self._opened(name) as file:
            here = set(file.keys())
            for key in (key for key, where in self._files.items() if where == name):
                if key not in here:
                    raise InputError(f"{self.path / name} has no {key}, which {INDEX} says is in it")
                piece = file.get_slice(key)
                self._shapes[key] = (tuple(piece.get_shape()), _DTYPES[piece.get_dtype()])

    def names(self) -> list[str]:
        return list(self._files)

    def file_of(self, key: str) -> str:
        return self._files[key]

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shapes[key][0]

    def dtype(self, key: str) -> torch.dtype:
        return self._shapes[key][1]

    def part(self, key: str, part: tuple[slice, ...]) -> Tensor:
        """A part of the tensor `key`, in the memory of the mapped file: copy what is to stay."""
        name = self._files[key]
        if self._open is None or self._open[0] != name:
            self.close()
            self._open = (name, self._opened(name).__enter__())
        piece = self._open[1].get_slice(key)
        shape, dtype = self._shapes[key]
        if any(there.stop == there.start for there in part):
            return torch.empty([there.stop - there.start for there in part], dtype=dtype)
        value = piece[part] if shape else piece[...]
        self.read_bytes += value.numel() * value.element_size()
        return value

    def close(self) -> None:
        if self._open is not None:
            self._open[1].__exit__(None, None, None)
            self._open = None

    def described(self) -> str:
        """The same for the same files, wherever they lie."""
        lines = [f"{name} {(self.path / name).stat().st_size}" for name in sorted(set(self._files.values()))]
        lines += [f"{key} {self._files[key]} {shape}" for key, shape in sorted(self._shapes.items())]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
