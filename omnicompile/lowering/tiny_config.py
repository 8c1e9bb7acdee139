"""Shrinks a Hugging Face configuration to a tiny one of the same structure, by the names that models share.

Kept: kinds of layers, ratio of query to key heads, ties between equal widths, proportions of rotary sections, groups of
experts. A configuration that a rule does not fit is shrunk less: see `LEVELS`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Shrunk at each level, from all to least: the caller takes the first that runs.
LEVELS: tuple[frozenset[str], ...] = (
    frozenset({"layers", "experts", "vocabulary", "mlp", "width", "image"}),
    frozenset({"layers", "experts", "vocabulary", "mlp", "width"}),
    frozenset({"layers", "experts", "mlp", "width"}),
    # All widths by one factor: a projector may take several patches side by side.
    frozenset({"layers", "experts", "vocabulary", "mlp", "width", "image", "ratios"}),
    frozenset({"layers", "experts", "vocabulary", "mlp", "width", "ratios"}),
    # Heads keep their width, and there are fewer of them: sizes of rotary sections may lie in the model's code.
    frozenset({"layers", "experts", "vocabulary", "mlp", "width", "image", "whole heads"}),
    frozenset({"layers", "experts", "vocabulary", "mlp", "width", "whole heads"}),
    frozenset({"layers", "experts", "vocabulary", "mlp"}),
    frozenset({"layers", "experts"}),
)
WIDTH, HEADS, MLP, EXPERT_MLP, EXPERTS, VOCABULARY, RANK, IMAGE_PATCHES = 128, 8, 256, 64, 8, 512, 32, 8
WHOLE_WIDTH = 512  # where heads keep their width
_MOST_LAYERS = 8

_LAYERS = re.compile(r"(^|_)n?_?layers?$|^depths?$|^num_.*(layers|blocks)$")
_DENSE_LAYERS = re.compile(r"dense_replace|dense_layers|layer_start_index")
_HEADS = re.compile(r"heads?$")
_KEY_HEADS = re.compile(r"kv|key_value|key_heads|value_heads")
_HEAD_DIM = re.compile(r"head_dim$|head_size$|d_head$|^d_kv$")
_WIDTH = re.compile(
    r"(hidden_size|embed_dim|d_model|n_embd|hidden_dim|embedding_size|output_dim|out_dim|proj_dim|projection_dim|width"
    r"|projector_dim|projection_size|model_dim|hidden_channels)$|^dim$"
)
_HIDDEN = frozenset({"hidden_size", "embed_dim", "d_model", "n_embd"})
_MLP = re.compile(r"(intermediate_size|ffn_dim|mlp_dim|n_inner|ffn_hidden_size|feedforward|dim_ff|inner_dim)$")
_EXPERTS = re.compile(r"experts$")
_CHOSEN = re.compile(r"experts_per_tok|per_token|top_?k$|selected_experts")
_TOKEN_ID = re.compile(r"_(id|index|ids|idx|token)$")
_INDEX_LIST = re.compile(r"index|indices|indic|layers|layer_id|block")
_RANDOM = re.compile(r"drop|jitter")


@dataclass(frozen=True)
class _Sizes:
    """Of one configuration, before and after: heads, width of a head, layers; and the largest width after."""

    heads: tuple[int, int] | None
    head_dim: tuple[int, int] | None
    layers: tuple[int, int] | None
    width: int = WIDTH
    factor: float = 0.0  # of all widths, where their ratios are kept


def shrink(config: Any, what: frozenset[str]) -> Any:
    """A tiny copy of `config`. what: one of `LEVELS`. Randomness (dropout, jitter) is switched off."""
    small = copy.deepcopy(config)
    ids = _token_ids(small) if "vocabulary" in what else {}
    factor = _width_factor(small) if "ratios" in what else 0.0
    for node in _configs(small):
        _shrink_one(node, what, ids, factor)
    return small


def _width_factor(config: Any) -> float:
    """What makes the narrowest of all hidden sizes the tiny one."""
    widths = [v for node in _configs(config) for n, v in vars(node).items() if n in _HIDDEN and _number(v)]
    return min(1.0, WIDTH / min(widths, default=WIDTH))


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict"):
            yield from _configs(value)


def _token_ids(config: Any) -> dict[int, int]:
    """Special token ids outside the tiny vocabulary -> ids at its end, the same for the same."""
    found: set[int] = set()
    for node in _configs(config):
        for name, value in vars(node).items():
            if _TOKEN_ID.search(name):
                values = value if isinstance(value, list | tuple) else [value]
                found |= {v for v in values if _number(v)}
    free = (n for n in range(VOCABULARY - 1, 0, -1) if n not in found)
    return {old: next(free) for old in sorted(found, reverse=True) if old >= VOCABULARY}


def _number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shrink_one(node: Any, what: frozenset[str], ids: dict[int, int], factor: float) -> None:
    fields = dict(vars(node))
    sizes = _sizes(fields, what, factor)
    for name, value in fields.items():
        if name.startswith("_"):
            continue
        new = _shrunk(name, value, fields, sizes, what, ids)
        if new is not value and new != value:
            setattr(node, name, new)
    _keep_expansion(node, fields)
    if "dtype" in fields:
        node.dtype = None


def _keep_expansion(node: Any, before: dict[str, Any]) -> None:
    """Heads times their width stay a stated multiple (`.._expand`) of the hidden size, as in state-space layers."""
    hidden = before.get("hidden_size")
    for name, factor in before.items():
        if not (name.endswith("expand") and _number(factor) and _number(hidden)):
            continue
        prefix = name.removesuffix("expand")
        heads = next((f"{prefix}{n}" for n in ("n_heads", "num_heads") if _number(before.get(f"{prefix}{n}"))), None)
        dim = next((f"{prefix}{n}" for n in ("d_head", "head_dim") if _number(before.get(f"{prefix}{n}"))), None)
        if heads and dim and before[heads] * before[dim] == factor * hidden:
            setattr(node, dim, factor * node.hidden_size // getattr(node, heads))


def _sizes(fields: dict[str, Any], what: frozenset[str], factor: float) -> _Sizes:
    heads = next((v for n, v in fields.items() if _HEADS.search(n) and not _KEY_HEADS.search(n) and _number(v)), None)
    width = next((v for n, v in fields.items() if _WIDTH.search(n) and _number(v) and heads and v % heads == 0), None)
    embed = fields.get("embed_dim")
    if _number(embed) and heads and embed % heads == 0:
        width = embed  # where both are stated, the hidden size is that of the output
    stated = next((v for n, v in fields.items() if _HEAD_DIM.search(n) and "rope" not in n and _number(v)), None)
    layers = next((v for n, v in fields.items() if _LAYERS.search(n) and _number(v) and v > 1), None)
    few = (layers, _few_layers(fields, layers)) if layers is not None else None
    if "width" not in what or heads is None:
        return _Sizes(None, None, few, WIDTH, factor)
    tiny_heads = 1 << (min(heads, HEADS).bit_length() - 1)
    derived = width // heads if width is not None else None
    head_dim = stated or derived
    if head_dim is None:
        return _Sizes((heads, tiny_heads), None, few, WIDTH, factor)
    if "whole heads" in what:
        kept = 1 << (min(head_dim, WHOLE_WIDTH).bit_length() - 1) if head_dim == derived else head_dim
        tiny_heads = min(tiny_heads, max(1, min(WHOLE_WIDTH, width or WHOLE_WIDTH) // kept))
        return _Sizes((heads, tiny_heads), (head_dim, kept), few, WHOLE_WIDTH)
    small_width = _scaled_width(width or WIDTH, factor) if factor else min(WIDTH, width or WIDTH)
    tiny_dim = small_width // tiny_heads if head_dim == derived else max(8, round(head_dim / 32) * 4)
    return _Sizes((heads, tiny_heads), (head_dim, tiny_dim), few, WIDTH, factor)


def _scaled_width(width: int, factor: float) -> int:
    return max(8, round(width * factor / 8) * 8)


def _few_layers(fields: dict[str, Any], layers: int) -> int:
    """The fewest layers, two at least, that have every kind which lists with an entry per layer tell apart."""
    fewest = min(2, layers)
    lists = [v for v in fields.values() if isinstance(v, list | tuple) and len(v) == layers]
    period = [v for n, v in fields.items() if re.search(r"interval|period|frequency|_step$|pattern$", n) and _number(v)]
    fewest = max([fewest, *(p for p in period if 1 < p <= _MOST_LAYERS)])
    for values in lists:
        kinds = {str(v) for v in values}
        if len(kinds) < len(values) // 2:
            fewest = max(fewest, next(n for n in range(1, layers + 1) if {str(v) for v in values[:n]} == kinds))
    return min(fewest, _MOST_LAYERS, layers)


def _shrunk(
    name: str, value: Any, fields: dict[str, Any], sizes: _Sizes, what: frozenset[str], ids: dict[int, int]
) -> Any:
    if isinstance(value, float) and _RANDOM.search(name):
        return 0.0
    if name == "apply_spec_augment":
        return False
    if ids and _TOKEN_ID.search(name) and isinstance(value, int | list):
        return (
            [ids.get(v, v) for v in value]
            if isinstance(value, list)
            else ids.get(value, value)
            if _number(value)
            else value
        )
    if isinstance(value, dict):
        return _rotary(value, sizes) if name.startswith("rope") else value
    if isinstance(value, list | tuple):
        return _shrunk_list(name, list(value), sizes, what)
    if name == "image_size" and "image" in what:
        return _tiny_image(fields)
    if not _number(value) or value <= 1:
        return value
    return _shrunk_number(name, value, sizes, what)


def _shrunk_number(name: str, value: int, sizes: _Sizes, what: frozenset[str]) -> int:
    if _DENSE_LAYERS.search(name):
        return 1
    if _LAYERS.search(name):
        old, few = sizes.layers or (value, 2)
        return few if value == old else max(1, min(value * few // old, few)) if value < old else min(value, few)
    if "experts" in what:
        if re.search(r"topk_group|group_topk", name):
            return 1
        if re.search(r"^n_group|expert_group|num_groups$", name):
            return min(value, 2)
        if _CHOSEN.search(name):
            return min(value, 16 if "index" in name else 2)
        if _EXPERTS.search(name) and "shared" not in name:
            return min(value, EXPERTS)
    if "vocabulary" in what and "vocab_size" in name:
        return min(value, VOCABULARY)
    if "mlp" in what and _MLP.search(name):
        return min(value, EXPERT_MLP if re.search(r"moe|expert", name) else MLP)
    if "width" in what:
        return _narrow(name, value, sizes)
    return value


def _narrow(name: str, value: int, sizes: _Sizes) -> int:
    if _HEAD_DIM.search(name) and sizes.head_dim is not None:
        old, new = sizes.head_dim
        return new if value == old else max(4, round(value * new / old / 4) * 4)
    if _HEADS.search(name) and sizes.heads is not None:
        old, new = sizes.heads
        if not _KEY_HEADS.search(name):
            return new if value == old else 1 << (min(value, HEADS).bit_length() - 1)
        scaled = max(min(2, value), value * new // old)
        return 1 << (scaled.bit_length() - 1)
    if _WIDTH.search(name):
        return _scaled_width(value, sizes.factor) if sizes.factor else min(value, sizes.width)
    return min(value, RANK) if name.endswith("rank") else value


def _shrunk_list(name: str, values: list[Any], sizes: _Sizes, what: frozenset[str]) -> list[Any]:
    numbers = bool(values) and all(_number(v) for v in values)
    if sizes.layers is not None and len(values) == sizes.layers[0]:
        values = values[: sizes.layers[1]]
        return [_shrunk_number(name, v, sizes, what) if _number(v) and v > 1 else v for v in values]
    if not numbers:
        return values
    if name == "depths":
        return [min(v, 2) for v in values]
    if sizes.layers is not None and _INDEX_LIST.search(name) and max(values) < sizes.layers[0]:
        return _indices(values, *sizes.layers)
    return values


def _indices(values: list[int], layers: int, few: int) -> list[int]:
    """Places of chosen layers among fewer layers; not all of them are chosen where not all were."""
    if any(v < 0 for v in values):
        return list(dict.fromkeys(max(v, -few) for v in values))
    places = list(dict.fromkeys(v * few // layers for v in values))
    return places[1:] if len(places) == few and len(values) < layers and few > 1 else places


def _tiny_image(fields: dict[str, Any]) -> Any:
    size, patch = fields["image_size"], fields.get("patch_size")
    return min(size, patch * IMAGE_PATCHES) if isinstance(size, int) and isinstance(patch, int) else size


def _rotary(value: dict[str, Any], sizes: _Sizes) -> dict[str, Any]:
    """Sections and factor lists of rotary positions, for narrower heads."""
    if sizes.head_dim is None:
        return value
    old, new = sizes.head_dim
    result: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            item = _rotary(item, sizes)
        elif key.endswith("section") and isinstance(item, list):
            item = _scaled(item, new / old)
        elif isinstance(item, list) and len(item) == old // 2:
            item = item[: new // 2]
        result[key] = item
    return result


def _scaled(sections: list[int], factor: float) -> list[int]:
    """Whole numbers in the proportions of `sections` that add up to its sum times `factor`."""
    exact = [s * factor for s in sections]
    result = [int(x) for x in exact]
    missing = round(sum(exact)) - sum(result)
    for place in sorted(range(len(exact)), key=lambda i: result[i] - exact[i])[:missing]:
        result[place] += 1
    return result
