"""Plain data (dicts, lists, scalars) to dataclasses and back, with errors that name the place and the remedy.

The dataclasses themselves are the schema: a field added to one is at once readable and writable.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from enum import Enum, StrEnum
from typing import Any, Union, get_args, get_origin, get_type_hints

from omnicompile.errors import RecipeError

Path = tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """Where a value stands: the file, the path of keys, and the line of every path in that file."""

    file: str
    path: Path = ()
    lines: dict[Path, int] = field(default_factory=dict)

    def key(self, name: str) -> Place:
        return Place(self.file, (*self.path, name), self.lines)

    def error(self, message: str) -> RecipeError:
        line = self.lines.get(self.path)
        where = self.file if line is None else f"{self.file}:{line}"
        return RecipeError(f"{where}: {'.'.join(self.path)}: {message}" if self.path else f"{where}: {message}")


def suggestion(name: str, allowed: Iterable[str]) -> str:
    """' (did you mean sp?)', or the allowed names when none is close."""
    names = list(allowed)
    close = get_close_matches(name, names, n=1)
    return f" (did you mean {close[0]}?)" if close else f" (known: {', '.join(names)})"


def encode(value: Any) -> Any:
    """A dataclass as nested dicts, lists and scalars; None stays None."""
    if is_dataclass(value):
        return {f.name: encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    return value


def decode(kind: Any, value: Any, place: Place) -> Any:
    """`value` as an object of the annotated type `kind`; raises RecipeError where it does not have that type."""
    if is_dataclass(kind) and isinstance(kind, type):
        return _decode_dataclass(kind, value, place)
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return _decode_enum(kind, value, place)
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        options = [option for option in get_args(kind) if option is not type(None)]
        return None if value is None else decode(options[0], value, place)
    if origin is tuple:
        return _decode_tuple(get_args(kind), value, place)
    if origin is dict:
        item = get_args(kind)[1]
        return {key: decode(item, entry, place.key(key)) for key, entry in mapping(value, place).items()}
    return _decode_scalar(kind, value, place)


def mapping(value: Any, place: Place) -> dict[str, Any]:
    """`value` if it is a mapping with text keys."""
    if not isinstance(value, dict):
        raise place.error(f"must be a mapping of keys to values, got {_show(value)}")
    for key in value:
        if not isinstance(key, str):
            raise place.error(f"keys must be text, got {key!r}")
    return value


def check_keys(data: dict[str, Any], allowed: Iterable[str], place: Place) -> None:
    names = tuple(allowed)
    for key in data:
        if key not in names:
            raise place.key(key).error(f"unknown key {key!r}{suggestion(key, names)}")


def field_types(kind: type) -> dict[str, Any]:
    """Annotated type of every field of a dataclass."""
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in fields(kind)}


def _decode_dataclass(kind: type, value: Any, place: Place) -> Any:
    data = mapping(value, place)
    hints = field_types(kind)
    check_keys(data, hints, place)
    missing = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    for name in missing:
        if name not in data:
            raise place.error(f"key {name!r} is missing")
    return kind(**{name: decode(hints[name], item, place.key(name)) for name, item in data.items()})


def _decode_enum(kind: type[StrEnum], value: Any, place: Place) -> StrEnum:
    allowed = [member.value for member in kind]
    if isinstance(value, str) and value in allowed:
        return kind(value)
    raise place.error(f"must be one of {', '.join(allowed)}, got {_show(value)}")


def _decode_tuple(args: tuple[Any, ...], value: Any, place: Place) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise place.error(f"must be a list, got {_show(value)}")
    kinds = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
    if len(kinds) != len(value):
        raise place.error(f"must have {len(kinds)} entries, got {len(value)}")
    return tuple(decode(kind, item, place) for kind, item in zip(kinds, value))


def _decode_scalar(kind: Any, value: Any, place: Place) -> Any:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float:
        if number:
            return float(value)
        if isinstance(value, str):  # YAML reads 2e10 as text
            try:
                return float(value)
            except ValueError:
                pass
    elif type(value) is kind:
        return value
    raise place.error(f"must be {words.get(kind, str(kind))}, got {_show(value)}")


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return "nothing" if value is None else repr(value)
