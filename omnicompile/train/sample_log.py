"""Which samples every step has seen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from omnicompile.whole_file import write_whole


class SampleLog:
    """A file of lines `{"step": 12, "samples": [[epoch, number, part], ...]}`, of the steps that the weights have
    seen."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, step: int, keys: Sequence[Sequence[int]]) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "samples": [list(key) for key in keys]}) + "\n")

    def keep(self, steps: int) -> None:
        """Drop what was written of steps after number `steps`, and a line that a killed run has left half written."""
        if self._path.exists():
            lines = [line for line in self._path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            write_whole(self._path, "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= steps))
