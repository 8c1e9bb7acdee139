"""Rows of a file of published training runs, as typed fields; what a row does not state is None or "".

The columns are those of `benchmarks/data/runs.csv`. A row is taken apart by its columns and by general patterns in
`notes` ("VP=5", "GA=64", "ZeRO-1", "4x100Gb RoCE per node", ...), never by its id.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from omnicompile.errors import InputError

COLUMNS = (
    "id", "source", "model", "params_b", "arch_notes", "gpu", "gpus", "gpus_per_node", "dp", "fsdp", "hsdp_replicate",
    "tp", "pp", "cp_or_sp", "ep", "seq_len", "micro_batch", "global_batch_seqs", "precision", "recompute",
    "attention_kernel", "compiled", "tokens_per_s_per_gpu", "tflops_per_gpu", "mfu_pct", "iter_time_s", "peak_mem_gib",
    "notes",
)  # fmt: skip
TEXTS = (
    "id", "source", "model", "arch_notes", "gpu", "precision", "recompute", "attention_kernel", "compiled", "notes",
)  # fmt: skip
NUMBERS = frozenset(COLUMNS) - frozenset(TEXTS)


class SkipRow(Exception):
    """Why a row cannot be predicted, in a few words that are the same for all rows with that reason."""


@dataclass(frozen=True)
class Row:
    """One published run. `text`: columns as printed. Numbers are read by `number` and `whole`."""

    text: dict[str, str]

    @property
    def id(self) -> str:
        return self.text["id"]

    @property
    def suite(self) -> str:
        """The publisher, as the id begins: "MPT" of "MPT-115"."""
        return self.id.partition("-")[0]

    def __getitem__(self, column: str) -> str:
        return self.text[column]

    def number(self, column: str) -> float | None:
        return float(self.text[column]) if self.text[column] else None

    def whole(self, column: str) -> int | None:
        """The column as a whole number of at least 1, None if not stated. Raises SkipRow for another number."""
        value = self.number(column)
        if value is not None and (value != int(value) or value < 1):
            raise SkipRow(f"{column} is no whole number of at least 1")
        return None if value is None else int(value)

    def needed(self, column: str) -> int:
        """The same, and SkipRow where it is not stated."""
        value = self.whole(column)
        if value is None:
            raise SkipRow(f"{column} not stated")
        return value

    def notes_match(self, pattern: str, flags: int = re.IGNORECASE) -> re.Match[str] | None:
        return re.search(pattern, self.text["notes"], flags)

    def mentions(self, pattern: str, *columns: str) -> bool:
        """Whether any of the columns (default: notes) has the pattern, in either case."""
        return any(re.search(pattern, self.text[c], re.IGNORECASE) for c in columns or ("notes",))


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a CSV file. Raises InputError for an unreadable file, a missing column or a number that is none."""
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [c for c in COLUMNS if c not in (reader.fieldnames or ())]
            if missing:
                raise InputError(f"{path}: has no column {', '.join(missing)}")
            rows = [_row(line, f"{path}:{reader.line_num}") for line in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise InputError(f"{path}: two rows have the id {row.id}")
        seen.add(row.id)
    return rows


def _row(line: dict[str, str | None], where: str) -> Row:
    text = {column: (line[column] or "").strip() for column in COLUMNS}
    if not text["id"]:
        raise InputError(f"{where}: a row without an id")
    for column in NUMBERS:
        if text[column] and not _is_number(text[column]):
            raise InputError(f"{where}: {column} is no number: {text[column]!r}")
    return Row(text)


def _is_number(text: str) -> bool:
    try:
        value = float(text)
    except ValueError:
        return False
    return 0 <= value < float("inf")
