"""Sources give the same records whatever the format, and bad ones are named."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import webdataset
from PIL import Image

from omnicompile.data import BadSample, open_source
from omnicompile.data.media import load_audio, load_image, load_video
from omnicompile.data.policy import Policy
from omnicompile.data.sample import to_sample
from omnicompile.data.sources import first_kind
from omnicompile.errors import InputError


def png(shade: int, size: tuple[int, int] = (6, 4)) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(data, "PNG")
    return data.getvalue()


def _shades(source: Any) -> list[tuple[str, list[int]]]:
    samples = [to_sample(source[n], "text", source.where(n)) for n in range(len(source))]
    return [(s.text or "", [load_image(image).getpixel((0, 0))[0] for image in s.images]) for s in samples]


WANT = [("zero", [10, 20]), ("one", []), ("two", [30])]


def _json_lines(folder: Path) -> str:
    for shade in (10, 20, 30):
        (folder / f"{shade}.png").write_bytes(png(shade))
    lines = [json.dumps({"text": text, "images": [f"{s}.png" for s in shades]}) for text, shades in WANT]
    (folder / "a.jsonl").write_text("\n".join(lines[:2]) + "\n\n")
    (folder / "b.jsonl").write_text(lines[2] + "\n")
    return str(folder / "*.jsonl")


def _shards(folder: Path) -> str:
    with webdataset.ShardWriter(str(folder / "s-%d.tar"), maxcount=2, verbose=0) as writer:
        for number, (text, shades) in enumerate(WANT):
            fields = {f"{n}.png": png(shade) for n, shade in enumerate(shades)}
            writer.write({"__key__": f"k{number}", "txt": text, **fields})
    return str(folder / "s-{0..1}.tar")


def _saved(folder: Path) -> str:
    columns = {"text": [t for t, _ in WANT], "images": [[{"bytes": png(s), "path": None} for s in n] for _, n in WANT]}
    features = datasets.Features({"text": datasets.Value("string"), "images": datasets.List(datasets.Image())})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


@pytest.mark.parametrize("make", [_json_lines, _shards, _saved])
def test_formats_give_the_same_samples(make: Any, tmp_path: Path) -> None:
    path = make(tmp_path)
    source = open_source(path)
    assert _shades(source) == WANT
    assert open_source(path).fingerprint == source.fingerprint


def test_records_in_memory_and_a_dataset_object() -> None:
    rows = [{"text": "a", "image": png(7)}, {"text": "b"}]
    assert _shades(open_source(rows)) == [("a", [7]), ("b", [])]
    assert len(open_source(datasets.Dataset.from_dict({"text": ["a", "b"]}))) == 2
    with pytest.raises(InputError, match="is a IterableDataset"):
        open_source(datasets.Dataset.from_dict({"text": ["a"]}).to_iterable_dataset())


def test_other_contents_have_another_fingerprint(tmp_path: Path) -> None:
    before = open_source(_json_lines(tmp_path)).fingerprint
    (tmp_path / "b.jsonl").write_text('{"text": "other"}\n')
    assert open_source(str(tmp_path / "*.jsonl")).fingerprint != before


def test_empty_and_missing_sources_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    for given, message in (
        (str(tmp_path / "empty.jsonl"), "empty.jsonl is empty"),
        ([], "the dataset is empty"),
        (str(tmp_path / "none.jsonl"), "cannot be read"),
        (str(tmp_path / "*.tar"), "no file matches"),
        (str(tmp_path / "folder"), "does not exist"),
        (str(tmp_path), "no folder that `datasets` saved"),
    ):
        with pytest.raises(InputError, match=message):
            open_source(given)
    (tmp_path / "bad.tar").write_bytes(b"not a tar file")
    with pytest.raises(InputError, match="uncompressed tar"):
        open_source(str(tmp_path / "bad.tar"))


def test_a_shard_with_a_field_twice_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "twice.tar", "w") as shard:
        for _ in range(2):
            member = tarfile.TarInfo("k.txt")
            member.size = 1
            shard.addfile(member, io.BytesIO(b"x"))
    with pytest.raises(InputError, match="sample k has txt twice"):
        open_source(str(tmp_path / "twice.tar"))


def test_a_mixed_schema_is_refused() -> None:
    chat = {"messages": [{"role": "user", "content": "hello"}]}
    assert first_kind(open_source([chat]), Policy.REFUSE) == "messages"
    with pytest.raises(InputError, match="mixed schema"):
        to_sample({"text": "a"}, "messages", "here")
    with pytest.raises(InputError, match="either `messages` or `text`, this one has messages and text"):
        to_sample({"text": "a", **chat}, "text", "here")
    with pytest.raises(InputError, match="this one has only prompt"):
        first_kind(open_source([{"prompt": "a"}]), Policy.REFUSE)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": []}, "at least one message"),
        ({"messages": [{"content": "x"}]}, "no `role`"),
        ({"messages": [{"role": "user", "content": 3}]}, "neither text nor a list"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "name 1 images, but it has 0"),
    ],
)
def test_a_malformed_record_is_a_bad_sample(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        to_sample(record, "messages", "here")


def test_lines_that_are_no_objects_are_bad_samples(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": \n[1]\n')
    source = open_source(str(tmp_path / "a.jsonl"))
    for number, reason in ((1, "no JSON"), (2, "a JSON list")):
        with pytest.raises(BadSample, match=reason):
            source[number]
    assert source.where(1).endswith("a.jsonl at byte 14")


def test_media_of_several_forms(tmp_path: Path) -> None:
    import soundfile

    soundfile.write(tmp_path / "a.wav", np.ones((800, 2), dtype=np.float32) * 0.5, 8000)
    assert load_audio(str(tmp_path / "a.wav"), 16000).shape == (1600,)
    assert load_audio({"array": np.zeros(10), "sampling_rate": 4}, None).shape == (10,)
    np.save(tmp_path / "v.npy", np.zeros((3, 4, 6, 3), dtype=np.uint8))
    assert load_video(str(tmp_path / "v.npy")).shape == load_video([png(1), png(2), png(3)]).shape
    (tmp_path / "b.wav").write_bytes(b"RIFF")
    for load, value in ((load_image, png(5)[:40]), (load_image, "none.png"), (load_image, 3)):
        with pytest.raises(BadSample):
            load(value)
    with pytest.raises(BadSample, match="cannot be read"):
        load_audio(str(tmp_path / "b.wav"), None)
