"""Choices that the user has made: `vision.sp=1`, `mesh.sp=4`, `micro_batch=2`. The planner keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any

from omnicompile.errors import PlanError
from omnicompile.plan import OURS, BlockPlan, Layout, LossHead, Mesh, Overlap, Sharding, Stack
from omnicompile.program import Program, Recompute
from omnicompile.schema import field_types

Parser = Any
MESH_FIELDS = tuple(f.name for f in fields(Mesh))
STEP_FIELDS: dict[str, Parser] = {
    "micro_batch": int,
    "accumulation": int,
    "loss_head": LossHead,
    "offload_optimizer": bool,
    "param_dtype": str,
    "reduce_dtype": str,
    # Not a choice of the plan: also consider what is planned on request only.
    "priced": bool,
}
STACK_FIELDS: dict[str, Parser] = field_types(Stack)
OVERLAP_FIELDS: dict[str, Parser] = field_types(Overlap)
BLOCK_FIELDS: dict[str, Parser] = {
    "sharding": Sharding,
    "layout": Layout,
    "sp": int,
    "ep": int,
    "recompute": Recompute,
    "offload": bool,
    "reshard": bool,
    "frozen": bool,
}


@dataclass(frozen=True)
class Pins:
    """Pinned values: of the mesh, of the step, of each block, of the software stack and of what overlaps, by field
    name."""

    mesh: dict[str, int] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)
    blocks: dict[str, dict[str, Any]] = field(default_factory=dict)
    stack: dict[str, Any] = field(default_factory=dict)
    overlap: dict[str, Any] = field(default_factory=dict)

    def allows_block(self, name: str, plan: BlockPlan) -> bool:
        wanted = self.blocks.get(name, {})
        values = {f.name: getattr(plan, f.name) for f in fields(plan)}
        return all(values[key] == value for key, value in wanted.items())

    def allows_mesh(self, mesh: Mesh) -> bool:
        values = {f.name: getattr(mesh, f.name) for f in fields(mesh)}
        return all(values[key] == value for key, value in self.mesh.items())

    def allows_step(self, name: str, value: object) -> bool:
        return name not in self.step or self.step[name] == value

    def describe(self) -> str:
        parts = [f"mesh.{k}={v}" for k, v in self.mesh.items()] + [f"{k}={v}" for k, v in self._chosen.items()]
        parts += [f"{block}.{k}={v}" for block, values in self.blocks.items() for k, v in values.items()]
        parts += [f"stack.{k}={v}" for k, v in self.stack.items()]
        parts += [f"overlap.{k}={v}" for k, v in self.overlap.items()]
        return ", ".join(parts)

    def __bool__(self) -> bool:
        return bool(self.mesh or self._chosen or self.blocks or self.stack or self.overlap)

    @property
    def _chosen(self) -> dict[str, Any]:
        """Pinned choices of the step; "priced" widens the search and pins nothing."""
        return {k: v for k, v in self.step.items() if k != "priced"}


def parse_pins(pins: Mapping[str, str], program: Program) -> Pins:
    """Pins from text. Raises PlanError for an unknown block or field (listing those there are) or a wrong value."""
    parsed = Pins()
    names = [b.name for b in program.blocks]
    for key, text in pins.items():
        owner, _, name = key.rpartition(".")
        if owner == "mesh" or (not owner and name in MESH_FIELDS):
            parsed.mesh[name] = _value(key, name, dict.fromkeys(MESH_FIELDS, int), text, "")
        elif owner == "stack" or (not owner and name in STACK_FIELDS):
            parsed.stack[name] = _value(key, name, STACK_FIELDS, text, "")
        elif owner == "overlap" or (not owner and name in OVERLAP_FIELDS):
            parsed.overlap[name] = _value(key, name, OVERLAP_FIELDS, text, "")
        elif owner in ("", "step"):
            parsed.step[name] = _value(key, name, STEP_FIELDS, text, f"or a field of {', '.join(['mesh', *names])}")
        elif owner in names:
            parsed.blocks.setdefault(owner, {})[name] = _value(key, name, BLOCK_FIELDS, text, "")
        else:
            others = ["mesh", "step", "stack", "overlap", *names]
            raise PlanError(f"pin {key}: no block {owner!r}; there are {', '.join(others)}")
    return parsed


def refuse_priced_only(pins: Pins) -> None:
    """Raises PlanError for pins of what `simulate` prices for a given layout and a search does not consider."""
    for name in ("tp", "cp", "pp"):
        if pins.mesh.get(name, 1) != 1:
            raise PlanError(
                f"pin mesh.{name}={pins.mesh[name]}: {name} is not executable yet, so no plan has it; "
                f"`omnicompile simulate --layout {name}={pins.mesh[name]}` prices it"
            )
    for name, value in pins.stack.items():
        if value == asdict(OURS)[name]:
            continue
        raise PlanError(
            f"pin stack.{name}={value}: describes another software stack, so no plan has it; "
            f"`omnicompile simulate --layout {name}={value}` prices it"
        )


def _value(key: str, name: str, known: Mapping[str, Parser], text: str, also: str) -> Any:
    if name not in known:
        raise PlanError(f"pin {key}: no field {name!r}; there are {', '.join(known)}{', ' + also if also else ''}")
    kind = known[name]
    if kind is bool:
        value = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(str(text).lower())
        if value is None:
            raise PlanError(f"pin {key}={text}: must be true or false")
        return value
    try:
        value = kind(text)
    except ValueError:
        choice = isinstance(kind, type) and issubclass(kind, StrEnum)
        allowed = ", ".join(kind) if choice else "a number" if kind is float else "a whole number"
        raise PlanError(f"pin {key}={text}: must be {allowed}") from None
    if kind is int and value < 1:
        raise PlanError(f"pin {key}={text}: must be at least 1")
    if kind is float and not 0 <= value <= 1:
        raise PlanError(f"pin {key}={text}: must be between 0 and 1")
    return value
