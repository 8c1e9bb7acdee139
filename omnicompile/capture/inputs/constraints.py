"""What a model's forward puts on the sizes of its inputs."""

from __future__ import annotations

from torch import nn

from omnicompile.capture.inputs.audio import audio_constraints
from omnicompile.capture.inputs.facts import Facts, first_value, placeholder_id
from omnicompile.capture.inputs.types import InputConstraints, Rows
from omnicompile.capture.inputs.vision import image_constraints


def input_constraints(model: nn.Module) -> InputConstraints:
    """Raises CaptureError for a model without a Hugging Face configuration."""
    return constraints_of(Facts.of(model))


def constraints_of(facts: Facts) -> InputConstraints:
    images, audio = image_constraints(facts), audio_constraints(facts)
    contrastive = "return_loss" in facts.arguments
    rows = Rows.SAMPLES
    if images is not None and (contrastive or placeholder_id(facts, "image") is None):
        rows = Rows.IMAGES
    elif images is None and audio is not None and placeholder_id(facts, "audio") is None:
        rows = Rows.CLIPS
    return InputConstraints(
        images=images,
        audio=audio,
        max_seq_len=_max_seq_len(facts, contrastive),
        rows=rows,
        encoder_decoder=bool(getattr(facts.config, "is_encoder_decoder", False)),
        contrastive=contrastive,
    )


def _max_seq_len(facts: Facts, contrastive: bool) -> int | None:
    """The longest row of text where positions are learned one by one; rotary positions have no such bound."""
    stated = first_value([facts.text], "max_target_positions", "max_position_embeddings", "n_positions")
    if stated is None:
        return None
    learned = any(
        isinstance(module, nn.Embedding) and stated <= module.num_embeddings <= stated + 2 and "pos" in name.lower()
        for name, module in facts.model.named_modules()
    )
    return int(stated) if learned or contrastive else None
