"""What a command shows while it works: one changing line on a terminal, nothing anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO

Progress = Callable[[str], None]


@contextmanager
def working(first: str, debug: bool) -> Iterator[Progress]:
    """A function that replaces the line shown on stderr.

    Until the end of the context what others print to stdout goes to stderr, so that `--json` stays JSON, and what
    libraries print to stderr is dropped unless `debug`, so that an error is one line.
    """
    terminal = sys.stderr
    with redirect_stdout(terminal), redirect_stderr(terminal if debug else StringIO()):
        if not terminal.isatty():
            yield lambda line: None
            return
        from rich.console import Console

        with Console(file=terminal).status(first) as status:
            yield lambda line: status.update(line)


def color_wanted() -> bool:
    """Whether stdout is a terminal that takes colours (and NO_COLOR is unset)."""
    import os

    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def emit(text: str) -> None:
    """Print to stdout; glyphs that its encoding lacks become '?'."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, errors="replace").decode(encoding))
    sys.stdout.flush()
