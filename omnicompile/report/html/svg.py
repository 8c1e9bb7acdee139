"""SVG as text: elements whose content is escaped, numbers without noise, text cut to a width."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from markupsafe import Markup, escape

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
_NARROW, _WIDE = frozenset("fijlrtI.,:;'|!()[]/ "), frozenset("mwMW@%&—…")

Value = str | float | None


def tag(name: str, *children: str, **attributes: Value) -> Markup:
    """`<name ...>children</name>`; what is not Markup is escaped. `class_` means class, `font_size` font-size; an
    attribute of None is left out."""
    parts = [
        Markup(' {}="{}"').format(_name(key), _value(value)) for key, value in attributes.items() if value is not None
    ]
    head = Markup("<{}{}").format(Markup(name), Markup("").join(parts))
    body = Markup("").join(clean(child) for child in children)
    return Markup("{}>{}</{}>").format(head, body, Markup(name)) if body else Markup("{}/>").format(head)


def clean(text: str) -> Markup:
    """`text` escaped (Markup is not), without characters that XML has no way to write."""
    return text if isinstance(text, Markup) else escape(_CONTROL.sub("\ufffd", text))


def number(value: float) -> str:
    """At most two decimals, as few as needed."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def share(fraction: float) -> str:
    """A part of the drawing's width: 12.345%."""
    text = f"{100 * fraction:.3f}".rstrip("0").rstrip(".")
    return f"{'0' if text == '-0' else text}%"


def drawing(key: str, title: str, description: str, children: Iterable[str], **attributes: Value) -> Markup:
    """An `<svg>` that says what it shows. key: unique on the page."""
    names = f"{key}-title {key}-desc"
    told = tag("title", title, id=f"{key}-title"), tag("desc", description, id=f"{key}-desc")
    given: dict[str, Value] = {"xmlns": "http://www.w3.org/2000/svg", "role": "img", "aria-labelledby": names}
    return tag("svg", *told, *children, **given, **attributes)


def group(*children: str, **attributes: Value) -> Markup:
    return tag("g", *children, **attributes)


def rect(x: Value, y: float, width: Value, height: float, *children: str, **attributes: Value) -> Markup:
    return tag("rect", *children, x=x, y=y, width=width, height=height, **attributes)


def line(x1: Value, y1: float, x2: Value, y2: float, **attributes: Value) -> Markup:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, **attributes)


def text(x: Value, y: float, words: str, *children: str, **attributes: Value) -> Markup:
    return tag("text", words, *children, x=x, y=y, **attributes)


def text_width(words: str, size: float) -> float:
    """About how wide `words` are in a sans-serif of `size`; rather too much than too little."""
    units = 0.0
    for glyph in words:
        units += 0.36 if glyph in _NARROW else 0.95 if glyph in _WIDE else 0.7 if glyph.isupper() else 0.61
        units += 0.4 if ord(glyph) > 0x2E80 else 0.0
    return units * size


def fit(words: str, width: float, size: float) -> str:
    """`words`, cut with … to `width`."""
    if text_width(words, size) <= width:
        return words
    while words and text_width(words + "…", size) > width:
        words = words[:-1]
    return words.rstrip() + "…"


def first_fit(options: Sequence[str], width: float, size: float) -> str:
    """The first of `options` that fits, otherwise the last, cut."""
    return next((words for words in options if text_width(words, size) <= width), fit(options[-1], width, size))


def _name(key: str) -> str:
    return key.rstrip("_").replace("_", "-") if key not in ("viewBox", "preserveAspectRatio") else key


def _value(value: str | float) -> Markup:
    return clean(value) if isinstance(value, str) else Markup(number(value))
