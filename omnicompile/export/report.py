"""What an export did with every choice of a plan: mapped to the target's keys, approximated, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

Keys = dict[str, Any]
"""Settings of a target by their full names; the target's writer gives them their form."""


class Outcome(StrEnum):
    MAPPED = "mapped"  # the target does the same
    APPROXIMATED = "approximated"  # the target does something like it
    REFUSED = "refused"  # the target's configuration cannot say it


@dataclass(frozen=True)
class Said:
    """What a target says to one choice. keys: what it is written as. why: needed unless it is mapped."""

    outcome: Outcome
    keys: Keys = field(default_factory=dict)
    why: str = ""


@dataclass(frozen=True)
class Line:
    """One choice of the plan ("mesh.sp" or "vision.layout"), its value, and what became of it."""

    choice: str
    value: str
    said: Said


@dataclass(frozen=True)
class Export:
    """A configuration of another framework, and what it does not hold of the plan.

    version: of the framework that the keys are from. to_set: what the user has to add. text: the file.
    """

    target: str
    version: str
    text: str
    keys: Keys
    lines: tuple[Line, ...]
    to_set: tuple[str, ...]

    def of(self, outcome: Outcome) -> list[Line]:
        return [line for line in self.lines if line.said.outcome is outcome]

    @property
    def lost(self) -> list[Line]:
        """Everything that is not exactly as planned."""
        return self.of(Outcome.APPROXIMATED) + self.of(Outcome.REFUSED)

    def to_json(self) -> dict[str, Any]:
        view: dict[str, Any] = {"target": self.target, "version": self.version}
        view |= {outcome.value: [_json(line) for line in self.of(outcome)] for outcome in Outcome}
        return view | {"to_set": list(self.to_set), "text": self.text}


def mapped(keys: Mapping[str, Any] | None = None, why: str = "") -> Said:
    return Said(Outcome.MAPPED, dict(keys or {}), why)


def approximated(why: str, keys: Mapping[str, Any] | None = None) -> Said:
    return Said(Outcome.APPROXIMATED, dict(keys or {}), why)


def refused(why: str) -> Said:
    return Said(Outcome.REFUSED, {}, why)


def lost_lines(lines: list[Line]) -> list[str]:
    """What is not exactly as planned, a line per choice."""
    return [f"{line.said.outcome.value} {line.choice}={line.value}: {line.said.why}" for line in lines]


def report_text(export: Export) -> str:
    """For a person: how many choices are as planned, each that is not with its reason, and what to add."""
    exact = len(export.of(Outcome.MAPPED))
    lines = [f"{export.target} ({export.version}): {exact} of {len(export.lines)} choices as planned"]
    lines += [f"  {text}" for text in lost_lines(export.lost)]
    if export.to_set:
        lines.append(f"  to set yourself: {'; '.join(export.to_set)}")
    return "\n".join(lines)


def _json(line: Line) -> dict[str, Any]:
    return {"choice": line.choice, "value": line.value, "keys": line.said.keys, "why": line.said.why}
