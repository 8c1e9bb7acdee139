"""Example inputs for any Hugging Face model, from its configuration and the signature of its forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from omnicompile.capture.inputs.audio import audio_layouts
from omnicompile.capture.inputs.constraints import constraints_of
from omnicompile.capture.inputs.facts import Facts, placeholder_id
from omnicompile.capture.inputs.probe import Observation, observe, stated_rows
from omnicompile.capture.inputs.text import Span, make_text, rope_positions
from omnicompile.capture.inputs.types import ExampleInputs, FloatSpec, InputConstraints, InputRequest, Rows
from omnicompile.capture.inputs.vision import image_layouts
from omnicompile.errors import CaptureError

TOKEN_IDS = frozenset({"input_ids"})
# Ordinary tensor inputs; every other integer tensor is metadata that models loop over on the host.
ORDINARY = frozenset(
    {
        "input_ids",
        "labels",
        "position_ids",
        "decoder_input_ids",
        "protein_input_ids",
        "qformer_input_ids",
        "cross_attention_mask",
        "image_attention_mask",
    }
)
_PROBE_SEQ_LEN = 211  # prime, and unlike any hidden size: it tells the text sequence from other dimensions
_IMAGE, _AUDIO = 1, 2


def make_inputs(
    model: nn.Module, sample: InputRequest, check: bool = True, limits: InputConstraints | None = None
) -> ExampleInputs:
    """Arguments for `model`'s forward (with loss) with exactly the numbers of `sample`.

    `model` may be on the meta device. check: run the whole forward on fake tensors, and make host metadata of the token
    ids where its control flow depends on them. limits: what to keep to instead of the model's own `input_constraints`.
    Raises CaptureError where an input cannot be guessed, or where `sample`
    breaks the model's `input_constraints`.
    """
    facts = Facts.of(model)
    limits = limits or constraints_of(facts)
    rows_of = {Rows.SAMPLES: sample.batch, Rows.IMAGES: sample.images, Rows.CLIPS: sample.clips}
    rows = rows_of[limits.rows] or sample.batch
    _check(limits, sample)
    towers: dict[str, Any] = {}
    spans: list[Span] = []
    tokens = {"image": 0, "audio": 0}
    grid = _grid(limits, sample)
    frames = _frames(limits, sample)
    if limits.images is not None and sample.images:
        given, tokens["image"] = _choose(
            facts, limits, "image", sample.images, rows, sample.seq_len,
            lambda length: list(image_layouts(facts, sample.images, grid, rows, length)),
        )  # fmt: skip
        towers |= given
        spans += _spans(facts, "image", tokens["image"], sample.images, _IMAGE)
    if limits.audio is not None and sample.clips:
        given, tokens["audio"] = _choose(
            facts, limits, "audio", sample.clips, rows, sample.seq_len,
            lambda _: list(audio_layouts(facts, sample.clips, frames)),
        )  # fmt: skip
        towers |= given
        spans += _spans(facts, "audio", tokens["audio"], sample.clips, _AUDIO)
    kwargs = _text_arguments(facts, limits, rows, sample.seq_len, spans, towers)
    return ExampleInputs(
        kwargs=kwargs,
        host=_checked_host_names(facts, kwargs, sample.seq_len) if check else _host_names(kwargs),
        seq_len=sample.seq_len,
        rows=rows,
        images=sample.images if limits.images else 0,
        clips=sample.clips if limits.audio else 0,
        tokens_per_image=tokens["image"],
        patches_per_image=grid[0] * grid[1],
        frames_per_clip=frames,
        tokens_per_clip=tokens["audio"],
    )


def _check(limits: InputConstraints, sample: InputRequest) -> None:
    if limits.max_seq_len is not None and sample.seq_len > limits.max_seq_len:
        raise CaptureError(f"the model takes at most {limits.max_seq_len} text tokens, got {sample.seq_len}")
    if limits.images is None or limits.images.grid is not None or not sample.images or sample.image_grid is None:
        return
    if any(n % m for n, m in zip(sample.image_grid, limits.images.multiple)):
        raise CaptureError(f"the image grid {sample.image_grid} is not a multiple of {limits.images.multiple}")


def _grid(limits: InputConstraints, sample: InputRequest) -> tuple[int, int]:
    if limits.images is None or not sample.images:
        return 0, 0
    if limits.images.grid is not None:
        return limits.images.grid
    if sample.image_grid is None:
        raise CaptureError("the model takes images of any size: say which (image_grid)")
    return sample.image_grid


def _frames(limits: InputConstraints, sample: InputRequest) -> int:
    if limits.audio is None or not sample.clips:
        return 0
    if limits.audio.frames is not None:
        return limits.audio.frames
    if sample.audio_frames is None:
        raise CaptureError("the model takes audio of any length: say which (audio_frames)")
    return sample.audio_frames


def _spans(facts: Facts, modality: str, tokens: int, count: int, kind: int) -> list[Span]:
    token = placeholder_id(facts, modality)
    return [Span(token, tokens, kind)] * count if token is not None and tokens else []


def _choose(
    facts: Facts,
    limits: InputConstraints,
    modality: str,
    count: int,
    rows: int,
    seq_len: int,
    layouts: Callable[[int], list[dict[str, Any]]],
) -> tuple[dict[str, Any], int]:
    """The first of `layouts(text length)` that the forward takes, and the placeholders it asks for per item."""
    token = placeholder_id(facts, modality)
    kind = _IMAGE if modality == "image" else _AUDIO
    shortest = min(_PROBE_SEQ_LEN, limits.max_seq_len or _PROBE_SEQ_LEN, seq_len)

    def probe(layout: dict[str, Any], tokens: int, length: int, retry: bool = False) -> Observation:
        spans = [Span(token, tokens, kind)] * count if token is not None else []
        kwargs = _text_arguments(facts, limits, rows, length, spans, layout, probing=True)
        seen = observe(facts.model, kwargs, _host_names(kwargs), length)
        if seen.depends_on_values or (retry and seen.error is not None):
            seen = observe(facts.model, kwargs, _host_names(kwargs) | TOKEN_IDS, length)
        return seen

    failures: list[str] = []
    candidates = layouts(shortest)
    for number, layout in enumerate(candidates):
        # Two each: some models take a lone placeholder for an unexpanded one and expand it themselves.
        seen = probe(layout, 2, shortest)
        stated = 0 if seen.error is None or token is None else stated_rows(seen.error, 2 * count)
        if stated and stated % count == 0:
            length = shortest + stated
            again = probe(layouts(length)[number], stated // count, length, retry=True)
            if again.error is None and again.rows in (None, stated):
                seen = Observation(rows=stated)
        if seen.rows is not None and seen.rows % count:
            failures.append(f"{count} equal {modality} inputs gave {seen.rows} features")
        elif seen.rows is not None:
            return layouts(seq_len)[number], seen.rows // count
        elif seen.error is None:
            return layouts(seq_len)[number], 0
        else:
            failures.append(" ".join(f"{type(seen.error).__name__}: {seen.error}".split())[:300])
    raise CaptureError(
        f"cannot guess the {modality} inputs ({', '.join(sorted(candidates[0]))}) of {type(facts.model).__name__}: "
        f"{_most_telling(failures)}; give a function inputs()"
    )


def _most_telling(failures: list[str]) -> str:
    """Of the candidates' failures the first that is not about the shape of the candidate itself."""
    about_shape = ("ValueError: not enough values", "ValueError: too many values")
    return next((f for f in failures if not f.startswith(about_shape)), failures[0])


def _text_arguments(
    facts: Facts,
    limits: InputConstraints,
    rows: int,
    seq_len: int,
    spans: list[Span],
    towers: dict[str, Any],
    probing: bool = False,
) -> dict[str, Any]:
    """All keyword arguments: `towers`, and the text that goes with them."""
    names = facts.arguments
    text = make_text(facts, rows, seq_len, spans)
    kwargs = {name: value for name, value in towers.items() if name in names}
    if "input_ids" in names:
        kwargs["input_ids"] = text.ids if (streams := _streams(facts)) == 1 else _in_streams(text.ids, streams)
    if limits.contrastive:
        kwargs["return_loss"] = True
    elif "labels" in names:
        kwargs["labels"] = text.labels
    if "decoder_input_ids" in names:
        kwargs["decoder_input_ids"] = text.ids.clone()
    for name in ("mm_token_type_ids", "moe_mm_token_type_ids", "token_type_ids"):
        if name in names and (name != "token_type_ids" or spans):
            kwargs[name] = text.types
    if "position_ids" in names and spans and not probing:
        positions = rope_positions(facts.model, kwargs, text)
        if positions is not None:
            kwargs["position_ids"] = positions
    for name in names & {"protein_input_ids"}:
        kwargs[name] = text.ids.clone() % 20
    if "attention_mask" in names and hasattr(facts.text, "index_topk"):
        # A sparse-attention indexer scores against the mask itself, and no attention function makes one for it.
        kwargs["attention_mask"] = FloatSpec((rows, 1, seq_len, seq_len), facts.dtype)
    if "bbox" in names:
        kwargs["bbox"] = torch.zeros(rows, seq_len, 4, dtype=torch.long, device="cpu")
    if "use_cache" in names or hasattr(facts.text, "use_cache"):
        kwargs["use_cache"] = False
    return kwargs


def _streams(facts: Facts) -> int:
    """Tokens per position: models that embed text and the codes of audio together keep the offset of each stream's
    vocabulary."""
    if "audio_input_ids" in facts.arguments:
        return 1  # the codes of audio come by themselves
    offsets = (b for name, b in facts.model.named_buffers() if name.endswith("tokens_offsets") and b.dim() == 1)
    return next((b.numel() for b in offsets), 1)


def _in_streams(ids: Tensor, streams: int) -> Tensor:
    """[rows, seq_len] -> [rows, seq_len, streams]."""
    return ids.unsqueeze(-1).repeat(1, 1, streams)


def _host_names(kwargs: dict[str, Any]) -> set[str]:
    integers = {n: v for n, v in kwargs.items() if isinstance(v, Tensor) and not v.is_floating_point()}
    # Of four dimensions it is not about the text: it says which patches of each crop are no padding.
    crops = {n for n, v in integers.items() if n == "image_attention_mask" and v.dim() == 4}
    return (integers.keys() - ORDINARY) | crops


def _checked_host_names(facts: Facts, kwargs: dict[str, Any], seq_len: int) -> set[str]:
    host = _host_names(kwargs)
    seen = observe(facts.model, kwargs, host, seq_len, whole=True)
    if seen.error is not None and observe(facts.model, kwargs, host | TOKEN_IDS, seq_len, whole=True).error is None:
        return host | TOKEN_IDS
    return host
