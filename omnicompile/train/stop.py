"""Ending a run at a step's end when it is asked to."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """number: of the signal that has asked for the end, 0 for none. The second one ends the process at once."""

    def __init__(self) -> None:
        self.number = 0

    def take(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Until the end of the context SIGTERM and SIGINT are noted instead of ending the process. Main thread only."""
        before: dict[int, Any] = {number: signal.signal(number, self.take) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
