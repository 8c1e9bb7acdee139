"""What capture asks of a model that states its own inputs: sizes that its parts take, and arguments of given sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from omnicompile.capture.inputs.types import (
    AudioConstraints,
    ExampleInputs,
    FloatSpec,
    ImageConstraints,
    InputConstraints,
    InputRequest,
    Placeholder,
    TextTooShort,
)
from omnicompile.capture.regions import modality_of_input

if TYPE_CHECKING:
    from omnicompile.omni.encoder import Encoder
    from omnicompile.omni.model import OmniModel
    from omnicompile.omni.parts import ModalityPart

IGNORE = -100
_FIRST_TEXT = 3  # ids below may be padding, begin and end


@dataclass(frozen=True)
class _Items:
    """The items of one part in an example. tokens: placeholders of one. trained: the model produces them."""

    part: ModalityPart
    count: int
    tokens: int
    arguments: dict[str, Any]
    trained: bool = False
    fixed: bool = True


def input_constraints(model: OmniModel) -> InputConstraints:
    """Every part that is no audio encoder counts as images: what an encoder of packed patches takes decides their size,
    and all others have one size."""
    encoders = [model.encoder(name) for name in model.config.encoders or [] if not _is_audio(name)]
    packed = next((encoder.packing() for encoder in encoders if encoder.config.packed), None)
    images = None
    if packed is not None:
        images = ImageConstraints(packed["patch"], multiple=(packed["merge"], packed["merge"]), packed=True)
    elif fixed := [*encoders, *(model.decoder(name) for name in model.config.decoders or [])]:
        images = ImageConstraints(1, grid=(1, fixed[0].item_tokens))
    clips = [model.encoder(name) for name in model.config.encoders or [] if _is_audio(name)]
    audio = AudioConstraints(frames=clips[0].item_shape[-1]) if clips else None
    return InputConstraints(images=images, audio=audio)


def _is_audio(name: str) -> bool:
    return modality_of_input(f"{name}_values") == "audio"


def example_inputs(model: OmniModel, request: InputRequest) -> ExampleInputs:
    """A row of text with the items of every part: `request.images` of each that is no audio encoder, `request.clips` of
    those. Raises TextTooShort where they do not fit."""
    items = _all_items(model, request)
    needed = sum(one.count * (one.tokens + 2) for one in items)
    if needed + 1 > request.seq_len:
        raise TextTooShort(request.seq_len, needed + 1)
    special = {i for part in model.parts().values() for i in _token_ids(part)}
    vocabulary = model.get_input_embeddings().num_embeddings
    words = [i for i in range(_FIRST_TEXT, vocabulary) if i not in special][: request.seq_len]
    ids = torch.tensor(words, device="cpu").repeat(-(-request.seq_len // len(words)))[: request.seq_len]
    labels, at = ids.clone(), 1
    for one in items:
        token, start, end = _token_ids(one.part)
        for _ in range(one.count):
            span = slice(at + 1, at + 1 + one.tokens)
            ids[at], ids[span], ids[at + 1 + one.tokens] = start, token, end
            labels[at], labels[at + 1 + one.tokens] = start, end
            labels[span] = token if one.trained else IGNORE
            at += one.tokens + 2
    arguments = {name: value for one in items for name, value in one.arguments.items()}
    grid = request.image_grid or (0, 0)
    images, clips = [o for o in items if not _is_audio(o.part.config.name) or o.trained], request.clips
    audio = [o for o in items if o not in images]
    return ExampleInputs(
        kwargs={"input_ids": ids[None], "labels": labels[None], **arguments},
        # Which places an item takes is computed from these on the host.
        host={"input_ids", "labels", *(n for n in arguments if n.endswith("_grid_thw"))},
        seq_len=request.seq_len,
        images=request.images if images else 0,
        clips=clips if audio else 0,
        tokens_per_image=sum(o.tokens + 2 for o in images),
        fixed_tokens_per_image=sum(o.tokens * o.fixed + 2 for o in images),
        patches_per_image=grid[0] * grid[1],
        frames_per_clip=request.audio_frames or 0,
        tokens_per_clip=sum(o.tokens + 2 for o in audio),
    )


def placeholders(model: OmniModel) -> dict[str, Placeholder]:
    """What stands in the text for the items of each argument of the forward."""
    found = {}
    for name in model.config.encoders or []:
        encoder = model.encoder(name)
        placeholder = Placeholder(encoder.config.token_id)
        if encoder.config.packed:
            placeholder = Placeholder(encoder.config.token_id, f"{name}_grid_thw", encoder.packing()["merge"])
        found[f"{name}_values"] = placeholder
    for name in model.config.decoders or []:
        token = model.decoder(name).config.token_id
        found |= {f"output_{name}_{kind}": Placeholder(token) for kind in ("values", "ids")}
    return found


def _token_ids(part: ModalityPart) -> tuple[int, int, int]:
    config = part.config
    return config.token_id, config.start_token_id, config.end_token_id


def _all_items(model: OmniModel, request: InputRequest) -> list[_Items]:
    config, dtype = model.config, model.dtype
    found = []
    for name in config.encoders or []:
        encoder = model.encoder(name)
        count = request.clips if _is_audio(name) else request.images
        if count and encoder.config.packed is None:
            values = {f"{name}_values": FloatSpec((count, *encoder.item_shape), dtype)}
            found.append(_Items(encoder, count, encoder.item_tokens, values))
        elif count:
            found.append(_packed_items(encoder, count, request.image_grid or (0, 0), dtype))
    for name in config.decoders or []:
        decoder = model.decoder(name)
        if request.images:
            values = {f"output_{name}_values": FloatSpec((request.images, *decoder.item_shape), dtype)}
            found.append(_Items(decoder, request.images, decoder.item_tokens, values, trained=True))
    return found


def _packed_items(encoder: Encoder, count: int, grid: tuple[int, int], dtype: torch.dtype) -> _Items:
    name, sizes = encoder.config.name, encoder.packing()
    patches = FloatSpec((count * grid[0] * grid[1], sizes["row"]), dtype)
    grids = torch.tensor([[1, *grid]] * count, dtype=torch.long, device="cpu")
    arguments = {f"{name}_values": patches, f"{name}_grid_thw": grids}
    return _Items(encoder, count, encoder.tokens_of((1, *grid)), arguments, fixed=False)
