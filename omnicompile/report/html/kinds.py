"""Kinds of memory and of work on the page: their words, and the class that the style sheet colours."""

from __future__ import annotations

import re

MEMORY = (
    "parameters", "gradients", "optimizer", "activations", "temporaries", "gathered parameters", "buffers", "context",
    "allocator slack",
)  # fmt: skip
WORK = (
    "compute", "recompute", "optimizer", "all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast",
    "send_recv", "offload", "pipeline_bubble", "pipeline_send",
)  # fmt: skip
STREAM_WORDS = {
    "compute": "compute",
    "intra": "inside the node",
    "inter": "between nodes",
    "copy": "host copies",
}


def words(kind: str) -> str:
    """all-gather, exposed reduce-scatter: as the terminal says it."""
    return kind.replace("_", "-")


def memory_class(kind: str) -> str:
    return f"m-{_slug(kind)}" if kind in MEMORY else "m-other"


def work_class(kind: str) -> str:
    """Of a task, or of an "exposed ..." or "hidden ..." part of the step, which has the colour of its collective."""
    plain = kind.removeprefix("exposed ").removeprefix("hidden ")
    return f"k-{_slug(plain)}" if plain in WORK else "k-other"


def _slug(kind: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", kind.lower())
