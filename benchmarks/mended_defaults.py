"""Default configurations that cannot run in any framework, with the fields that keep them from it changed.

Rules are general: each looks at what fields say about each other, never at the class. What a rule fills in is what
sibling fields ask for, or the usual value. The numbers of such a class are those of the mended configuration.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator
from typing import Any

PLACEHOLDER_FIELDS = ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index", "video_token_id")
TOWER_OUTPUT_FIELDS = ("out_hidden_size", "output_dim", "output_proj_dim")
EXPERTS_PER_TOKEN = 8


class Mender:
    """Applies the rules to `config` and notes in `changed` what they change, as path.field=value."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.text = config.get_text_config()
        self.changed: list[str] = []

    def put(self, owner: Any, path: str, key: str, value: Any) -> None:
        setattr(owner, key, value)
        shown = repr(value) if len(repr(value)) < 60 else repr(value)[:40] + "..."
        self.changed.append(f"{path}{key}={shown}")

    def apply(self) -> None:
        for owner, path in list(nested(self.config)):
            self._layers(owner, path)
            self._experts(owner, path)
            self._heads(owner, path)
            self._rope_by_layer_type(owner, path)
            self._image_size(owner, path)
            self._shuffled_width(owner, path)
            self._tower(owner, path)
            self._fed_width(owner, path)
        self._projected_width()
        self._rotated_part()
        self._placeholders()

    def _tower(self, owner: Any, path: str) -> None:
        """A tower's output has the width of the text that it feeds; the attention operator takes no dropout."""
        for key, value in list(vars(owner).items()):
            if re.search(r"att.*drop", key) and isinstance(value, float) and value > 0:
                self.put(owner, path, key, 0.0)
            elif field(self.config, "projector_config") is not None:
                continue  # the projector makes the width
            elif key in TOWER_OUTPUT_FIELDS and owner is not self.text and value not in (None, self.text.hidden_size):
                self.put(owner, path, key, self.text.hidden_size)

    def _projected_width(self) -> None:
        """A projector reads what the encoder before it writes."""
        projector, encoder = field(self.config, "projector_config"), field(self.config, "encoder_config")
        width = field(encoder, "hidden_size")
        if width is not None and field(projector, "encoder_hidden_size", width) != width:
            self.put(projector, "projector_config.", "encoder_hidden_size", width)

    def _fed_width(self, owner: Any, path: str) -> None:
        """What an adapter says of the text's width is the text's width."""
        if field(owner, "text_hidden_size", self.text.hidden_size) != self.text.hidden_size:
            self.put(owner, path, "text_hidden_size", self.text.hidden_size)

    def _layers(self, owner: Any, path: str) -> None:
        """A kind for each layer: full attention; dense first layers, then sparse ones."""
        layers = field(owner, "num_hidden_layers")
        if not isinstance(layers, int):
            return
        if field(owner, "layer_types", 0) is None:
            self.put(owner, path, "layer_types", ["full_attention"] * layers)
        if field(owner, "mlp_layer_types", 0) is None:
            dense = field(owner, "first_k_dense_replace") or 0
            self.put(owner, path, "mlp_layer_types", ["dense"] * dense + ["sparse"] * (layers - dense))

    def _experts(self, owner: Any, path: str) -> None:
        """Routed layers choose some experts."""
        experts = field(owner, "n_routed_experts") or field(owner, "num_experts")
        if isinstance(experts, int) and field(owner, "num_experts_per_tok", 0) is None:
            self.put(owner, path, "num_experts_per_tok", min(EXPERTS_PER_TOKEN, experts))

    def _heads(self, owner: Any, path: str) -> None:
        """Heads divide the width, into parts of even size as rotation needs them."""
        width, heads = field(owner, "hidden_size"), field(owner, "num_attention_heads")
        if not isinstance(width, int) or not isinstance(heads, int) or field(owner, "head_dim") is not None:
            return
        shared = field(owner, "num_key_value_heads")
        shared = shared if isinstance(shared, int) and shared < heads else 1
        fitting = [n for n in range(1, heads + 1) if width % (2 * n) == 0 and n % shared == 0]
        if fitting and fitting[-1] != heads:
            self.put(owner, path, "num_attention_heads", fitting[-1])
            if field(owner, "num_key_value_heads") == heads:
                self.put(owner, path, "num_key_value_heads", fitting[-1])
        if field(owner, "head_dim", 0) is None:
            self.put(owner, path, "head_dim", width // field(owner, "num_attention_heads"))

    def _rope_by_layer_type(self, owner: Any, path: str) -> None:
        """A configuration whose rotary parameters are declared per kind of layer states them per kind."""
        declared = str(inspect.get_annotations(type(owner)).get("rope_parameters", ""))
        rope, kinds = field(owner, "rope_parameters") or {}, field(owner, "layer_types")
        if not declared.startswith("dict[str, ") or not kinds or set(kinds) & set(rope):
            return
        plain = {"rope_type": "default", "rope_theta": 10000.0, **rope}
        self.put(owner, path, "rope_parameters", {kind: dict(plain) for kind in dict.fromkeys(kinds)})

    def _image_size(self, owner: Any, path: str) -> None:
        """An image has as many patches as the tokens that are pooled from it, or as the projector knows of."""
        vision = field(owner, "vision_config")
        patch, size = field(vision, "patch_size"), field(vision, "image_size")
        if not isinstance(patch, int) or not isinstance(size, int):
            return
        side = size // patch
        tokens = field(owner, "mm_tokens_per_image")
        known = field(owner, "projector_patch_to_query_dict")
        if isinstance(tokens, int) and side < math.isqrt(tokens):
            self.put(vision, f"{path}vision_config.", "image_size", patch * math.isqrt(tokens))
        merged = field(owner, "downsample_factor") or field(owner, "scale_factor")
        if isinstance(merged, int) and side % merged:
            self.put(vision, f"{path}vision_config.", "image_size", patch * (side - side % merged))
        if isinstance(known, dict) and known and side**2 not in {int(n) for n in known}:
            self.put(vision, f"{path}vision_config.", "image_size", patch * math.isqrt(int(next(iter(known)))))

    def _shuffled_width(self, owner: Any, path: str) -> None:
        """What shuffling pixels into channels makes of the width is the width of the layer after it."""
        ratio, inner = field(owner, "pixel_shuffle_ratio"), field(owner, "intermediate_size")
        if ratio and isinstance(inner, int) and field(owner, "projector_input_dim"):
            width = int(inner * ratio**2)
            if width != field(owner, "hidden_size"):
                self.put(owner, path, "hidden_size", width)
            out = field(owner, "projector_output_dim")
            if out and field(owner, "vision_output_dim", out) != out:
                self.put(owner, path, "vision_output_dim", out)

    def _rotated_part(self) -> None:
        """The rotated part of a head is what its sections sum up to."""
        rope = field(self.text, "rope_parameters") or {}
        head_dim = field(self.text, "head_dim") or self.text.hidden_size // self.text.num_attention_heads
        sections = rope.get("mrope_section")
        rotated = 2 * sum(sections) if sections else 0
        if rotated and rotated != head_dim * rope.get("partial_rotary_factor", 1.0):
            rope["partial_rotary_factor"] = rotated / head_dim
            self.changed.append(f"rope_parameters.partial_rotary_factor={rotated / head_dim}")

    def built_sections(self, sections: list[int]) -> None:
        """Likewise for sections that only the model itself states: a head wide enough for them, or a part of it."""
        rope = field(self.text, "rope_parameters") or {}
        head_dim = field(self.text, "head_dim") or self.text.hidden_size // self.text.num_attention_heads
        rotated, factor = 2 * sum(sections), rope.get("partial_rotary_factor", 1.0)
        if rotated > int(head_dim * factor):
            self.put(self.text, "text_config.", "head_dim", int(rotated / factor))
        elif rotated < int(head_dim * factor):
            rope["partial_rotary_factor"] = rotated / head_dim
            self.changed.append(f"rope_parameters.partial_rotary_factor={rotated / head_dim}")

    def _placeholders(self) -> None:
        """Placeholder token ids that are not set get the last ids of the vocabulary."""
        for number, key in enumerate(PLACEHOLDER_FIELDS, 1):
            if field(self.config, key, 0) is None:
                self.put(self.config, "", key, self.text.vocab_size - number)


def nested(config: Any, path: str = "") -> Iterator[tuple[Any, str]]:
    """A configuration and all inside it, with their paths."""
    yield config, path
    for key, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            yield from nested(value, f"{path}{key}.")


def field(config: Any, name: str, missing: Any = None) -> Any:
    """The value of a field; `missing` for a configuration that has none."""
    return getattr(config, name, missing)


def mend(kind: type) -> tuple[Any, list[str]]:
    """The default configuration of model class `kind`, mended, and what was changed."""
    import torch

    mender = Mender(kind.config_class())  # type: ignore[attr-defined]
    mender.apply()
    try:
        with torch.device("meta"):
            model = kind(mender.config)
    except Exception:  # it will be built again, and the reason reported then
        return mender.config, mender.changed
    found = (module.__dict__.get("mrope_section") for module in model.modules())  # type: ignore[attr-defined]
    sections = next((s for s in found if isinstance(s, list)), None)
    if sections is not None:
        mender.built_sections(sections)
    return mender.config, mender.changed
