"""An omni-modal model: encoders put their embeddings into the input of a language model, decoders read its output."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import ModelOutput

from omnicompile.capture.inputs.types import ExampleInputs, InputConstraints, InputRequest, Placeholder
from omnicompile.errors import InputError
from omnicompile.omni import inputs
from omnicompile.omni.classes import import_class
from omnicompile.omni.config import DECODER, ENCODER, DecoderConfig, OmniConfig
from omnicompile.omni.decoder import IGNORE, DiscreteDecoder
from omnicompile.omni.encoder import Encoder
from omnicompile.omni.generation import Generated, generate
from omnicompile.omni.parts import ModalityPart, hidden_size

TEXT = "text"
_KINDS = {"discrete": DiscreteDecoder}


@dataclass
class OmniOutput(ModelOutput):
    """loss: the sum of `losses` times their weights. losses: "text" and the decoders by name, each a mean over its own
    targets. logits: of the text. hidden_states: [batch, tokens, hidden], what the heads read."""

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    hidden_states: Tensor | None = None
    past_key_values: Any = None


class OmniModel(PreTrainedModel):
    """Built from an `OmniConfig`; saved and loaded as one model."""

    config: OmniConfig
    config_class = OmniConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_missing: ClassVar[list[str]] = []

    def __init__(self, config: OmniConfig) -> None:
        super().__init__(config)
        self.foundation = AutoModelForCausalLM.from_config(config.foundation)
        hidden = hidden_size(config.foundation)
        vocabulary = self.foundation.get_input_embeddings().num_embeddings
        for name in config.encoders or []:
            self.add_module(ENCODER + name, Encoder(config.encoder(name), hidden))
        for name in config.decoders or []:
            self.add_module(DECODER + name, _decoder_class(config.decoder(name))(config.decoder(name), hidden))
        self.post_init()
        for part in self.parts().values():
            part.freeze()
            _check_tokens(part, vocabulary)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As of any Hugging Face model; what the configuration freezes is frozen, which loading forgets."""
        found = super().from_pretrained(*args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        with torch.device("meta"):
            trained = {name: p.requires_grad for name, p in cls(model.config).named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
        return found

    def parts(self) -> dict[str, ModalityPart]:
        """Encoders and decoders by the names of their modules."""
        return {name: part for name, part in self.named_children() if isinstance(part, ModalityPart)}

    def encoder(self, name: str) -> Encoder:
        """Raises InputError if there is none for this modality."""
        self.config.encoder(name)
        return self.get_submodule(ENCODER + name)  # type: ignore[return-value]

    def decoder(self, name: str) -> DiscreteDecoder:
        """Raises InputError if there is none for this modality."""
        self.config.decoder(name)
        return self.get_submodule(DECODER + name)  # type: ignore[return-value]

    def get_input_embeddings(self) -> nn.Module:
        return self.foundation.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.foundation.get_output_embeddings()

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        **features: Any,
    ) -> OmniOutput:
        """input_ids, labels: [batch, tokens]. Of encoder E: `E_values`, and `E_grid_thw` where its items are packed. Of
        decoder D: `output_D_values`, or `output_D_ids` with the codes; those whose places in `labels` hold the
        placeholder are targets. Items are in the order of their places in the text. position_ids that begin anew keep
        samples of a row apart, unless keys and values are kept (`use_cache`).

        Raises InputError for an argument that no part takes, and for a number of placeholders that does not match.
        """
        made: dict[str, tuple[Tensor, Tensor]] = {}
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.get_input_embeddings()(input_ids)
            inputs_embeds, made = self._with_features(input_ids, inputs_embeds, dict(features))
        with _input_of(self.get_output_embeddings()) as seen:
            output = self.foundation(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                labels=None if labels is None else self._text_labels(labels),
            )
        hidden = seen[-1]
        losses = {} if labels is None else {TEXT: output.loss}
        for name, (codes, places) in made.items():
            if labels is None:
                break
            token = self.config.decoder(name).token_id
            before = torch.cat([places[:, 1:], torch.zeros_like(places[:, :1])], 1)
            losses[name] = self.decoder(name).lm_head(hidden[before], codes, labels[places] == token)[1]
        return OmniOutput(
            loss=self._sum(losses) if losses else None,
            losses=losses or None,
            logits=output.logits,
            hidden_states=hidden,
            past_key_values=output.past_key_values,
        )

    def _with_features(
        self, input_ids: Tensor, embeds: Tensor, features: dict[str, Any]
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """Embeddings with what all parts have made, and for every decoder its codes and their places."""
        for name in self.config.encoders or []:
            values, grid = features.pop(f"{name}_values", None), features.pop(f"{name}_grid_thw", None)
            if values is not None:
                encoder = self.encoder(name)
                made = encoder.lm_encode(values, grid) if grid is not None else encoder.lm_encode(values)
                embeds = _put(embeds, input_ids == encoder.config.token_id, made, name)
        codes: dict[str, tuple[Tensor, Tensor]] = {}
        for name in self.config.decoders or []:
            values, ids = features.pop(f"output_{name}_values", None), features.pop(f"output_{name}_ids", None)
            if (given := values if ids is None else ids) is not None:
                decoder = self.decoder(name)
                made, found = decoder.lm_encode(given)
                places = input_ids == decoder.config.token_id
                embeds = _put(embeds, places, made, name)
                codes[name] = found, places
        if unknown := [name for name, value in features.items() if value is not None]:
            self._refuse(unknown[0])
        return embeds, codes

    def _refuse(self, argument: str) -> NoReturn:
        """Raises InputError for an argument that no part takes, naming the part that is missing if it is one."""
        if produced := re.fullmatch("output_(.+)_(values|ids)", argument):
            self.config.decoder(produced[1])
        elif read := re.fullmatch("(.+)_(values|grid_thw)", argument):
            self.config.encoder(read[1])
        raise InputError(f"no part of this model takes {argument}; it takes {', '.join(self.argument_names())}")

    def argument_names(self) -> list[str]:
        """Arguments of the forward that carry modalities."""
        found = []
        for name in self.config.encoders or []:
            found += [f"{name}_values"] + ([f"{name}_grid_thw"] if self.config.encoder(name).packed else [])
        for name in self.config.decoders or []:
            found += [f"output_{name}_values", f"output_{name}_ids"]
        return found

    def _text_labels(self, labels: Tensor) -> Tensor:
        """Labels of the language model: places of codes are the decoders'."""
        for name in self.config.decoders or []:
            labels = labels.masked_fill(labels == self.config.decoder(name).token_id, IGNORE)
        return labels

    def loss_weight(self, name: str) -> float:
        return self.config.text_loss_weight if name == TEXT else self.config.decoder(name).loss_weight

    def target_counts(self, batch: Mapping[str, Any]) -> dict[str, int]:
        """How many targets each loss has in a batch."""
        labels = batch["labels"]
        counts = {n: int((labels == self.config.decoder(n).token_id).sum()) for n in self.config.decoders or []}
        text = int((self._text_labels(labels)[..., 1:] != IGNORE).sum())
        return {TEXT: text} | counts

    def _sum(self, losses: dict[str, Tensor]) -> Tensor:
        parts = [loss if (w := self.loss_weight(name)) == 1.0 else loss * w for name, loss in losses.items()]
        return sum(parts[1:], parts[0])

    def generate(
        self, input_ids: Tensor, max_new_tokens: int = 64, temperature: float = 0.0, **features: Any
    ) -> Generated:
        """Continue the rows of `input_ids`, of equal length, with text and items of decoders; see generation.py."""
        return generate(self, input_ids, max_new_tokens, temperature, features)

    def placeholders(self) -> dict[str, Placeholder]:
        """What stands in the text for the items of each argument."""
        return inputs.placeholders(self)

    def input_constraints(self) -> InputConstraints:
        """What planning must know of the sizes that the parts take."""
        return inputs.input_constraints(self)

    def example_inputs(self, request: InputRequest) -> ExampleInputs:
        """Arguments of the forward with the numbers of `request`."""
        return inputs.example_inputs(self, request)


def _decoder_class(config: DecoderConfig) -> type[DiscreteDecoder]:
    if config.kind in _KINDS:
        return _KINDS[config.kind]
    found = import_class(config.kind, f"decoder {config.name}")
    missing = [name for name in ("lm_encode", "lm_head", "lm_embed", "lm_generate") if not hasattr(found, name)]
    if missing:
        raise InputError(f"decoder {config.name}: {config.kind} has no {missing[0]}")
    return found


def _check_tokens(part: ModalityPart, vocabulary: int) -> None:
    for field in ("token_id", "start_token_id", "end_token_id"):
        value = vars(part.config)[field]
        if not 0 <= value < vocabulary:
            raise InputError(
                f"{part.config.name}: {field} is {value}, but the language model has {vocabulary} tokens: add the "
                "special tokens to its vocabulary"
            )


def _put(embeds: Tensor, places: Tensor, made: Tensor, name: str) -> Tensor:
    """`made` [n, hidden] at the n `places` of `embeds`."""
    if type(made) is Tensor and (count := int(places.sum())) != made.shape[0]:
        raise InputError(f"the text has {count} placeholders of {name}, and its items make {made.shape[0]} embeddings")
    return embeds.masked_scatter(places.unsqueeze(-1), made.to(embeds.dtype))


@contextlib.contextmanager
def _input_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """What the module is called with, while active: the states that a language model's head reads, whatever the model
    does to its logits afterwards."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()
