"""What becomes of samples that cannot be used as they are."""

from __future__ import annotations

from enum import StrEnum


class Policy(StrEnum):
    REFUSE = "refuse"  # one clear error, and nothing is trained on
    SPLIT = "split"  # over-long samples only: cut between tokens, never within an image or clip
    SKIP = "skip"  # counted and logged
