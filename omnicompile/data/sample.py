"""The one form of a sample, and how records of any source are brought into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omnicompile.errors import InputError

_MEDIA = {"images": ("images", "image"), "audio": ("audio", "audios"), "videos": ("videos", "video")}
_TYPES = {"images": "image", "audio": "audio", "videos": "video"}
KINDS = ("messages", "text")


class BadSample(Exception):
    """A sample that cannot be read or encoded, with the reason; what follows is up to the policy for bad samples."""


@dataclass(frozen=True)
class Sample:
    """A conversation (`messages`: role and content, as chat templates take them) or a plain `text`, with its media in
    the order in which the text names them. images, audio, videos: as the source has them; `media.py` loads them."""

    messages: tuple[dict[str, Any], ...] | None = None
    text: str | None = None
    images: tuple[Any, ...] = ()
    audio: tuple[Any, ...] = ()
    videos: tuple[Any, ...] = ()

    @property
    def kind(self) -> str:
        return "text" if self.messages is None else "messages"


def kind_of(record: Mapping[str, Any], where: str) -> str:
    """Which of `KINDS` a record is. Raises InputError where it is neither or both."""
    found = [kind for kind in KINDS if record.get(kind) is not None]
    if len(found) != 1:
        have = " and ".join(found) if found else f"only {', '.join(sorted(map(str, record))) or 'nothing'}"
        raise InputError(f"{where}: a sample has either `messages` or `text`, this one has {have}")
    return found[0]


def to_sample(record: Mapping[str, Any], kind: str, where: str) -> Sample:
    """The sample that a record holds. Raises InputError where it is not of `kind`, the kind of the first record: a
    mixed source is an error of the whole source. Raises BadSample for anything wrong with this record alone."""
    if kind_of(record, where) != kind:
        raise InputError(
            f"{where}: mixed schema, this sample has no `{kind}`, which the first sample has: use one form"
        )
    media: dict[str, Any] = {name: _media(record, names) for name, names in _MEDIA.items()}
    if kind == "text":
        text = record["text"]
        if not isinstance(text, str) or not text:
            raise BadSample("`text` is not a text of at least one character")
        return Sample(text=text, **media)
    messages = _messages(record["messages"])
    _check_counts(messages, media)
    return Sample(messages=messages, **media)


def _media(record: Mapping[str, Any], names: tuple[str, ...]) -> tuple[Any, ...]:
    value = next((record[name] for name in names if record.get(name) is not None), ())
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _messages(value: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list | tuple) or not value:
        raise BadSample("`messages` is not a list of at least one message")
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise BadSample("a message has no `role`")
        if not isinstance(message.get("content"), str | list | tuple):
            raise BadSample(f"the content of a message of the {message['role']} is neither text nor a list of parts")
    return tuple({**message, "content": _content(message["content"])} for message in value)


def _content(value: Any) -> Any:
    """Parts without the empty fields that columns of a table give them."""
    if isinstance(value, str):
        return value
    return [{k: v for k, v in part.items() if v is not None} for part in value]


def _check_counts(messages: tuple[dict[str, Any], ...], media: Mapping[str, tuple[Any, ...]]) -> None:
    """Parts that stand for media must be as many as there are media."""
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    if not parts:
        return
    for name, given in media.items():
        named = sum(part.get("type") == _TYPES[name] for part in parts)
        if named != len(given):
            raise BadSample(f"its messages name {named} {name}, but it has {len(given)}")
