"""A Hardware as the text of a hardware file, with a comment on the source of each constant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any

from omnicompile.cost_model.calibration import number_text
from omnicompile.cost_model.hardware import AttentionEfficiency, CollectiveEfficiency, GemmEfficiency, Hardware, Link

DIGITS = 4
PARTS = (GemmEfficiency, CollectiveEfficiency, AttentionEfficiency)


def hardware_text(hardware: Hardware, comments: Mapping[str, str] = {}, head: Sequence[str] = ()) -> str:
    """comments: by dotted key, "gemm.store_fraction" or "gemm". head: lines above the file, as comments."""
    lines = [f"# {line}" for line in head]
    for field in fields(Hardware):
        value = getattr(hardware, field.name)
        if _is_default(field, value):
            continue
        lines += _lines(field.name, value, comments, field.name, "")
    return "\n".join(lines) + "\n"


def _is_default(field: Field[Any], value: Any) -> bool:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return value == default


def _lines(key: str, value: Any, comments: Mapping[str, str], path: str, indent: str) -> Iterator[str]:
    note = f"  # {comments[path]}" if comments.get(path) else ""
    if isinstance(value, PARTS):
        yield f"{indent}{key}:{note}"
        for field in fields(value):
            if not _is_default(field, getattr(value, field.name)):
                yield from _lines(
                    field.name, getattr(value, field.name), comments, f"{path}.{field.name}", indent + "  "
                )
    elif isinstance(value, Mapping) and value and all(isinstance(part, AttentionEfficiency) for part in value.values()):
        yield f"{indent}{key}:{note}"
        for name, part in value.items():
            yield from _lines(_quoted(name), part, comments, f"{path}.{name}", indent + "  ")
    else:
        yield f"{indent}{key}: {_value(value)}{note}"


def _value(value: Any) -> str:
    if isinstance(value, Link):
        rate, latency = number_text(value.bytes_per_second, DIGITS), number_text(value.latency_seconds, DIGITS)
        return f"{{bytes_per_second: {rate}, latency_seconds: {latency}}}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_quoted(str(k))}: {number_text(v, DIGITS)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(_value(list(v)) if isinstance(v, tuple) else _value(v) for v in value) + "]"
    if isinstance(value, list):
        return "[" + ", ".join(str(part) for part in value) + "]"
    if isinstance(value, str):
        return _quoted(value)
    return str(value) if isinstance(value, int) else number_text(value, DIGITS)


def _quoted(text: str) -> str:
    """As it is where YAML reads a plain word, otherwise in quotes."""
    plain = text.replace("-", "").replace("_", "").replace(".", "")
    number_like = text[:1].isdigit() and not text.isdigit()
    if plain.isalnum() and plain.isascii() and not number_like and text.lower() not in _WORDS:
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}
