"""Images, audio and video as processors take them, from paths, bytes or what is already loaded."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from omnicompile.data.sample import BadSample
from omnicompile.errors import InputError


def load_image(value: Any) -> Any:
    """A PIL image in RGB, decoded to the end. Raises BadSample where the data is corrupt or not an image."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(value, Image.Image):
        return value.convert("RGB")
    try:
        with Image.open(_opened(value, "image")) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise BadSample(f"image {_named(value)} cannot be read: {error}") from error


def load_audio(value: Any, rate: int | None) -> np.ndarray:
    """[samples] float32, one channel, at `rate` per second (None: as it is). Raises BadSample if it cannot be read."""
    if isinstance(value, Mapping) and value.get("array") is not None:
        sound, found = np.asarray(value["array"], dtype=np.float32), int(value["sampling_rate"])
    else:
        try:
            import soundfile
        except ImportError as error:
            raise InputError("reading audio files needs the package soundfile: pip install soundfile") from error
        try:
            sound, found = soundfile.read(_opened(value, "audio"), dtype="float32", always_2d=False)
        except (OSError, soundfile.LibsndfileError) as error:
            raise BadSample(f"audio {_named(value)} cannot be read: {error}") from error
    sound = sound.mean(-1) if sound.ndim > 1 else sound
    if rate is None or rate == found:
        return sound
    from scipy.signal import resample_poly

    return resample_poly(sound, rate, found).astype(np.float32)


def load_video(value: Any) -> Any:
    """Frames: a list of images, an array [frames, height, width, 3] (or the path of one, .npy), or the path of a file
    that one of transformers' video backends reads. Raises BadSample where it cannot be read."""
    if isinstance(value, list | tuple):
        return np.stack([np.asarray(load_image(frame)) for frame in value])
    if isinstance(value, np.ndarray):
        return value
    try:
        if isinstance(value, str | Path) and Path(value).suffix == ".npy":
            return np.load(value)
        from transformers.video_utils import load_video as read

        return read(str(value))[0]
    except ImportError as error:
        raise InputError(
            f"video {_named(value)} needs a backend of transformers, such as torchcodec: {error}"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise BadSample(f"video {_named(value)} cannot be read: {error}") from error


def _opened(value: Any, kind: str) -> Any:
    """A path, or a file object over bytes. Mappings are what `datasets` gives without decoding."""
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        return io.BytesIO(value)
    if isinstance(value, str | Path):
        return value
    raise BadSample(f"an {kind} is given as {type(value).__name__}, not as a path, bytes or {kind}")


def _named(value: Any) -> str:
    if isinstance(value, Mapping):
        value = value.get("path") or "of the record"
    return str(value) if isinstance(value, str | Path) else f"({type(value).__name__})"
