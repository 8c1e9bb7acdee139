"""What an omni-modal model is made of, as one Hugging Face configuration with its parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig

from omnicompile.errors import InputError
from omnicompile.omni.classes import find_class, make_config

ENCODER, DECODER = "encoder_", "decoder_"
PROJECTORS = ("mlp", "linear", "none")


class PartConfig(PretrainedConfig):
    """One modality.

    name: of the modality. tower_class: the model that is adapted (see `find_class`). tower: its configuration.
    arguments: further ones for its constructor. token_id / start_token_id / end_token_id: of the placeholder that
    stands for one of its features in the text, and of the tokens around an item. input: shape of one item, numbers or
    fields of `tower`; [] where items are packed. freeze: "all", "none" or the tower alone ("tower").
    """

    model_type = "omni_part"
    name: str = ""
    tower_class: str = ""
    tower: Any = None
    arguments: dict[str, Any] | None = None
    input: list[int | str] | None = None
    token_id: int = -1
    start_token_id: int = -1
    end_token_id: int = -1
    freeze: str = "none"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.tower_class and not isinstance(self.tower, PretrainedConfig):
            where = f"{self.model_type.removeprefix('omni_')} {self.name}"
            cls = find_class(self.tower_class, where)
            self.tower = make_config(cls, _without_version(self.tower or {}), where)
        if self.freeze not in ("all", "none", "tower"):
            raise InputError(f"{self.name}: freeze must be all, tower or none, got {self.freeze!r}")


class EncoderConfig(PartConfig):
    """A modality that is read.

    output: path of the features in what the tower returns. width: of a feature. stack: neighbouring features that
    become one token. projector: from there to the language model. packed: for towers that take the patches of all items
    in one row: {row: values of a patch, patch: its side in pixels, temporal: its frames, merge: patches per side that
    become one token, argument: name under which the tower takes the grids}.
    """

    model_type = "omni_encoder"
    output: str = "last_hidden_state"
    width: int | str = "hidden_size"
    stack: int = 1
    projector: str = "mlp"
    packed: dict[str, int | str] | None = None


class DecoderConfig(PartConfig):
    """A modality that is produced.

    kind: "discrete", or the path of a class with the interface of `DiscreteDecoder`. codes: number of codes of the
    tokenizer `tower`. encode: the tower's method from values to codes; codes_output: path of the codes in what it
    returns. decode: its method from codes to values; grid: whether that takes them as rows and columns. embed_dim: of
    the learned embedding of a code; head_dim: inside the head. loss_weight: of its loss.
    """

    model_type = "omni_decoder"
    kind: str = "discrete"
    codes: int | str = 0
    encode: str = "encode"
    codes_output: str = "image_tokens"
    decode: str = "decode"
    grid: bool = False
    embed_dim: int | str = 8
    head_dim: int = 0
    loss_weight: float = 1.0
    freeze: str = "tower"


class OmniConfig(PretrainedConfig):
    """foundation: configuration of a causal language model. encoders / decoders: names of modalities, whose
    configurations are the attributes `encoder_NAME` and `decoder_NAME`. special_tokens: their ids by text.
    text_loss_weight: of the language model's loss."""

    model_type = "omni"
    sub_configs: ClassVar[dict[str, Any]] = {}
    foundation: Any = None
    encoders: list[str] | None = None
    decoders: list[str] | None = None
    special_tokens: dict[str, int] | None = None
    text_loss_weight: float = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        parts = {k: v for k, v in kwargs.items() if k.startswith((ENCODER, DECODER))}
        super().__post_init__(**{k: v for k, v in kwargs.items() if k not in parts})
        self.foundation = _foundation(self.foundation)
        self.encoders, self.decoders = list(self.encoders or []), list(self.decoders or [])
        self.special_tokens = dict(self.special_tokens or {})
        for prefix, names, cls in ((ENCODER, self.encoders, EncoderConfig), (DECODER, self.decoders, DecoderConfig)):
            for name in names:
                given = parts.get(prefix + name)
                if given is None:
                    raise InputError(f"the configuration names the {prefix}{name} and does not describe it")
                made = cls(**_without_version(given)) if isinstance(given, Mapping) else given
                setattr(self, prefix + name, made)

    def encoder(self, name: str) -> EncoderConfig:
        """Raises InputError if there is none of this name."""
        return self._part(ENCODER, name, self.encoders or [])

    def decoder(self, name: str) -> DecoderConfig:
        """Raises InputError if there is none of this name."""
        return self._part(DECODER, name, self.decoders or [])

    def _part(self, prefix: str, name: str, names: list[str]) -> Any:
        if name not in names:
            raise InputError(
                f"the model has no {prefix.strip('_')} for {name!r}, only for {', '.join(names) or 'nothing'}: add it "
                f"to the {prefix.strip('_')}s of its configuration"
            )
        return getattr(self, prefix + name)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PretrainedConfig:
        config = self.foundation
        return config.get_text_config(decoder, encoder) if isinstance(config, PretrainedConfig) else self


def _without_version(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in fields.items() if k not in ("model_type", "transformers_version")}


def _foundation(given: Any) -> Any:
    if given is None or isinstance(given, PretrainedConfig):
        return given
    fields = dict(given)
    kind = fields.pop("model_type", None)
    if kind is None:
        raise InputError("foundation: give its model_type, as in a config.json")
    try:
        return AutoConfig.for_model(kind, **fields)
    except Exception as error:  # an unknown type, or the configuration's own checks
        raise InputError(f"foundation {kind}: {str(error).strip().splitlines()[-1]}") from error
