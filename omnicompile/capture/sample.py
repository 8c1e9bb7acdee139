"""The sizes of one sample of a Workload, for a model whose capture is generic."""

from __future__ import annotations

from omnicompile.capture.inputs.types import ExampleInputs, InputConstraints, Rows
from omnicompile.errors import InputError
from omnicompile.program import SampleShape
from omnicompile.workload import Workload


def sample_shape(limits: InputConstraints, generic: ExampleInputs, workload: Workload) -> SampleShape:
    """One sample of `workload` for this model. Raises InputError if the images asked for do not fit the sequence."""
    seq_len = min(workload.seq_len, limits.max_seq_len or workload.seq_len)
    patches = tokens_image = frames = tokens_clip = 0
    if limits.images is not None and generic.patches_per_image:
        rows, cols = limits.images.nearest_grid(*workload.image_size)
        patches = rows * cols
        fixed = generic.fixed_tokens_per_image
        tokens_image = fixed + round((generic.tokens_per_image - fixed) * patches / generic.patches_per_image)
    if limits.audio is not None and generic.frames_per_clip:
        seconds = 30.0 if workload.audio_seconds is None else workload.audio_seconds
        frames = limits.audio.nearest_frames(seconds)
        tokens_clip = round(generic.tokens_per_clip * frames / generic.frames_per_clip)
    images = _count(limits.images is not None, limits.rows is Rows.IMAGES, workload.images, 2)
    wanted = None if workload.audio_seconds is None else int(workload.audio_seconds > 0)
    clips = _count(limits.audio is not None, limits.rows is Rows.CLIPS, wanted, 1)
    room = seq_len - 16
    if workload.images is None and tokens_image:
        images = max(0, min(images, room // tokens_image))
    if workload.audio_seconds is None and tokens_clip:
        clips = max(0, min(clips, (room - images * tokens_image) // tokens_clip))
    needed = images * tokens_image + clips * tokens_clip
    if needed >= seq_len:
        raise InputError(
            f"{images} images of {tokens_image} tokens and {clips} clips of {tokens_clip} tokens do not fit into "
            f"--seq-len {seq_len}: use fewer or smaller images, or a longer sequence"
        )
    return SampleShape(
        patches_per_image=patches,
        tokens_per_image=tokens_image,
        frames_per_clip=frames,
        tokens_per_clip=tokens_clip,
        images=images,
        clips=clips,
        seq_len=seq_len,
    )


def _count(takes: bool, per_row: bool, asked: int | None, default: int) -> int:
    if not takes:
        return 0
    if per_row:
        return 1
    return default if asked is None else asked
