"""From a file that declares the parts of a model to its configuration and the model."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from omnicompile.errors import InputError
from omnicompile.omni.classes import find_class
from omnicompile.omni.config import DECODER, ENCODER, DecoderConfig, EncoderConfig, OmniConfig
from omnicompile.omni.model import OmniModel

_TOP = ("extends", "foundation", "encoders", "decoders", "special_tokens", "text_loss_weight")
_TOKENS = {"token": "token_id", "start": "start_token_id", "end": "end_token_id"}
_RENAMED = {"class": "tower_class", "config": "tower"}
_COMMON = ("arguments", "input", "freeze")
_OWN = {
    ENCODER: ("output", "width", "stack", "projector", "packed"),
    DECODER: (
        "kind", "codes", "encode", "codes_output", "decode", "grid", "embed_dim", "head_dim", "loss_weight",
    ),
}  # fmt: skip


def build(file: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> OmniModel:
    """The model that `file` declares, with weights of its parts' own initialization. See `read_config`."""
    return OmniModel(read_config(file, tokenizer))


def read_config(file: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> OmniConfig:
    """The configuration that a YAML file declares (docs/omni.md has the fields).

    tokenizer: gives the ids of special tokens; without one `special_tokens` in the file does. Raises InputError naming
    the file and the field for a field, class or token that is not known.
    """
    data = _read(Path(file), ())
    _refuse_unknown(data, _TOP, str(file))
    tokens = _special_tokens(data, tokenizer, str(file))
    values: dict[str, Any] = {}
    for prefix, cls, listed in ((ENCODER, EncoderConfig, "encoders"), (DECODER, DecoderConfig, "decoders")):
        parts = data.get(listed) or {}
        values[listed] = list(parts)
        for name, fields in parts.items():
            where = f"{file}: {prefix.strip('_')} {name}"
            values[prefix + name] = cls(**_part_fields(name, fields, prefix, tokens, where))
    if not data.get("foundation"):
        raise InputError(f"{file}: foundation is missing: give the configuration of a causal language model")
    return OmniConfig(
        foundation=data["foundation"],
        special_tokens=tokens,
        text_loss_weight=float(data.get("text_loss_weight", 1.0)),
        **values,
    )


def _read(file: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The file's fields over those of the files that it extends, the later of these over the earlier."""
    if file.resolve() in seen:
        raise InputError(f"{file} extends itself")
    try:
        data = yaml.safe_load(file.read_text())
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise InputError(f"{file} holds no mapping of fields")
    if "extends" not in data:
        return data
    bases = data["extends"] if isinstance(data["extends"], list) else [data["extends"]]
    result: dict[str, Any] = {}
    for base in bases:
        result = _over(result, _read(file.parent / str(base), (*seen, file.resolve())))
    return _over(result, data)


def _over(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`own` over `base`, mappings joined; null takes a field away."""
    result = dict(base)
    for name, value in own.items():
        both = isinstance(value, Mapping) and isinstance(base.get(name), Mapping)
        if value is None:
            result.pop(name, None)
        else:
            result[name] = _over(base[name], value) if both else value
    return result


def _refuse_unknown(data: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for name in data:
        if name not in known:
            close = get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"
            raise InputError(f"{where}: there is no field {name!r}{hint}")


def _special_tokens(data: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None, where: str) -> dict[str, int]:
    """Ids of the special tokens that the parts name."""
    stated = {str(k): int(v) for k, v in (data.get("special_tokens") or {}).items()}
    if tokenizer is None:
        return stated
    parts = {**(data.get("encoders") or {}), **{f"output {k}": v for k, v in (data.get("decoders") or {}).items()}}
    wanted = {str(part[field]) for part in parts.values() for field in _TOKENS if field in part} | set(stated)
    vocabulary = tokenizer.get_vocab()
    if missing := sorted(wanted - set(vocabulary)):
        raise InputError(
            f"{where}: the tokenizer has no token {', '.join(missing)}: add it with tokenizer.add_special_tokens"
        )
    return {token: vocabulary[token] for token in sorted(wanted)}


def _part_fields(name: str, fields: Any, prefix: str, tokens: Mapping[str, int], where: str) -> dict[str, Any]:
    if not isinstance(fields, Mapping):
        raise InputError(f"{where}: give its class, config and tokens as fields")
    _refuse_unknown(fields, (*_RENAMED, *_COMMON, *_TOKENS, *_OWN[prefix]), where)
    for needed in ("class", *_TOKENS):
        if needed not in fields:
            raise InputError(f"{where}: {needed} is missing")
    find_class(fields["class"], where)
    if not fields.get("packed") and not fields.get("input"):
        raise InputError(f"{where}: give the shape of one item as input, or packed")
    result: dict[str, Any] = {str(_RENAMED.get(key, key)): value for key, value in fields.items() if key not in _TOKENS}
    for field, target in _TOKENS.items():
        if fields[field] not in tokens:
            raise InputError(f"{where}: special_tokens gives no id for {fields[field]}")
        result[target] = tokens[fields[field]]
    return {"name": name, **result}
