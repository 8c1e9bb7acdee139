"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from omnicompile.errors import InputError


def check_target(path: str, option: str) -> None:
    """Raises InputError if no file can be written to `path`; `option` is what the path was given as."""
    target = Path(path).resolve()
    if not target.parent.is_dir():
        raise InputError(f"{option} {path}: directory {Path(path).parent} does not exist")
    if target.is_dir():
        raise InputError(f"{option} {path}: is a directory")
    if not os.access(target.parent, os.W_OK):
        raise InputError(f"{option} {path}: directory {Path(path).parent} is not writable")


def write_whole(path: str | Path, text: str) -> None:
    """Write `text` to `path` by way of a temporary file beside it. Raises OSError if that cannot be done."""
    target = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
