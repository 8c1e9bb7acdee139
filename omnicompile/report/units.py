"""Numbers as a person reads them, always with three significant digits and a unit."""

from __future__ import annotations

GIB = 2**30
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_DECIMAL = ("", " K", " M", " B", " T")
_SI = ("", " K", " M", " G", " T", " P", " E", " Z")


def digits(value: float) -> str:
    """Three significant digits, never an exponent: 0.0123, 1.23, 12.3, 1,234."""
    size = abs(value)
    if size >= 99.95 or value == 0:
        return f"{value:,.0f}"
    places = 1 if size >= 9.995 else 2 if size >= 0.9995 else 3 if size >= 0.09995 else 4
    return f"{value:.{places}f}"


def bytes_text(nbytes: float) -> str:
    """12.3 GiB; the unit that leaves at most four digits before the point."""
    value, unit = float(nbytes), 0
    while abs(value) >= 1024 and unit < len(_BINARY) - 1:
        value, unit = value / 1024, unit + 1
    return f"{digits(value)} {_BINARY[unit]}"


def gib(nbytes: float) -> str:
    """12.3 GiB whatever the size, so that a column of them compares by eye."""
    return f"{nbytes / GIB:,.1f} GiB"


def count_text(count: float) -> str:
    """73.4 B, 690 M, 12 (parameters, items)."""
    return _scaled(count, 1000, _DECIMAL)


def flops_text(flops: float) -> str:
    """33.6 TFLOP."""
    text = _scaled(flops, 1000, _SI)
    return f"{text}FLOP" if text[-1].isalpha() else f"{text} FLOP"


def seconds_text(seconds: float) -> str:
    """12.3 s, 4.56 ms, 2 h 05 min."""
    if seconds >= 5400:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    if seconds >= 0.9995 or seconds == 0:
        return f"{digits(seconds)} s"
    return f"{digits(seconds * 1e3)} ms" if seconds >= 0.9995e-3 else f"{digits(seconds * 1e6)} us"


def percent(fraction: float) -> str:
    """45.1%, and <0.1% for what is there but small."""
    if 0 < fraction < 0.0005:
        return "<0.1%"
    return f"{fraction * 100:.1f}%"


def plural(count: int, noun: str) -> str:
    """1 image, 1,000 images."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    unit = 0
    while abs(value) >= base and unit < len(units) - 1:
        value, unit = value / base, unit + 1
    return f"{value:.0f}" if unit == 0 and value == int(value) else f"{digits(value)}{units[unit]}"
