"""The shard format: what is written is what is read, by us and by others, byte for byte."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from sora_lite.data.index import Index
from sora_lite.data.manifest import SCHEMA_VERSION, Manifest
from sora_lite.data.shards import DamagedSample, Sample, ShardReader, ShardWriter
from sora_lite.errors import UserError


def make_sample(i: int, ext: str = "mp4") -> Sample:
    meta = {
        "frames": 17 + i,
        "height": 32,
        "width": 48,
        "fps": 8,
        "source": {"sha256": f"{i:064x}"},
        "captions": [f"é {i}"],
    }
    return Sample(key=f"{i:016x}_0_{i}", ext=ext, media=bytes([i]) * (700 + i), meta=meta)


def make_set(folder: Path, shards: int = 2, per_shard: int = 3) -> Manifest:
    folder.mkdir()
    manifest = Manifest(config_hash="c")
    for s in range(shards):
        with ShardWriter(folder / f"train-{s:06d}.tar", split="train") as writer:
            for i in range(per_shard):
                writer.add(make_sample(s * per_shard + i, ext="mp4" if i else "png"))
        manifest.shards.append(writer.entry)
    manifest.save(folder)
    return manifest


def test_what_is_written_is_read_by_offset(tmp_path: Path) -> None:
    make_set(tmp_path / "set")
    index = Index.load(tmp_path / "set", "train")
    assert len(index) == 6 and index.ext[0] == b"png" and index.ext[1] == b"mp4"
    assert index.shard.tolist() == [0, 0, 0, 1, 1, 1] and index.frames.tolist() == [17, 18, 19, 20, 21, 22]
    assert index.height[0] == 32 and index.width[0] == 48 and index.fps[0] == 8.0
    for i in range(6):
        with ShardReader(index.shard_paths[index.shard[i]]) as reader:
            media = reader.read(int(index.media_offset[i]), int(index.media_size[i]), int(index.crc32c[i]))
            meta = json.loads(reader.read(index.json_offset[i], index.json_size[i], index.json_crc32c[i]))
        sample = make_sample(i, ext=index.ext[i].decode())
        assert (index.key(i), media, meta) == (sample.key, sample.media, sample.meta)


def test_stock_webdataset_and_tar_read_it(tmp_path: Path) -> None:
    manifest = make_set(tmp_path / "set")
    urls = [str(tmp_path / "set" / entry.path) for entry in manifest.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [s["__key__"] for s in samples] == [make_sample(i).key for i in range(6)]
    assert samples[1]["mp4"] == make_sample(1).media and json.loads(samples[1]["json"]) == make_sample(1).meta
    with tarfile.open(urls[0]) as tar:
        assert [m.name.partition(".")[2] for m in tar] == ["png", "json", "mp4", "json", "mp4", "json"]
        assert {(m.mtime, m.uid, m.gid, m.mode) for m in tar} == {(0, 0, 0, 0o644)}


def test_same_samples_same_bytes(tmp_path: Path) -> None:
    assert make_set(tmp_path / "a") == make_set(tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_damage_is_found(tmp_path: Path) -> None:
    make_set(tmp_path / "set")
    index = Index.load(tmp_path / "set", "train")
    path = index.shard_paths[0]
    content = bytearray(path.read_bytes())
    content[index.media_offset[1] + 5] ^= 1
    path.write_bytes(content)
    with ShardReader(path) as reader:
        reader.read(index.media_offset[0], index.media_size[0], int(index.crc32c[0]))
        with pytest.raises(DamagedSample, match="checksum"):
            reader.read(index.media_offset[1], index.media_size[1], int(index.crc32c[1]))
        path.write_bytes(content[:1000])
        with pytest.raises(DamagedSample, match="early"):
            reader.read(index.media_offset[2], index.media_size[2], int(index.crc32c[2]))


def test_failed_shard_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="twice"), ShardWriter(tmp_path / "train-000000.tar", split="train") as writer:
        writer.add(make_sample(1))
        writer.add(make_sample(1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["", "a.b", "../x", "a/b", "a b", "é", "a\n", "x" * 91])
def test_unsafe_keys_are_refused(key: str) -> None:
    good = make_sample(0)
    with pytest.raises(ValueError, match="key"):
        Sample(key=key, ext="mp4", media=b"", meta=good.meta)


def test_what_is_missing_is_named_with_the_cure(tmp_path: Path) -> None:
    def refused(pattern: str) -> None:
        with pytest.raises(UserError, match=pattern):
            Index.load(tmp_path / "set", "train")

    refused(r"manifest\.json: not found.*sora-data run")
    manifest = make_set(tmp_path / "set")
    assert len(Index.load(tmp_path / "set", "validation")) == 0
    first = tmp_path / "set" / manifest.shards[0].index
    first.write_bytes(first.read_bytes()[:-1] + b"x")
    refused(r"idx\.parquet.*SHA-256.*again")
    (tmp_path / "set" / manifest.shards[0].path).unlink()
    refused(r"train-000000\.tar.*missing.*sora-data run")
    manifest.shards, manifest.pending = [], manifest.shards
    manifest.save(tmp_path / "set")
    refused(r"interrupted.*sora-data run")
    for content in (
        "[]",
        "{",
        '{"schema_version": 99}',
        json.dumps({"schema_version": SCHEMA_VERSION, "splits": {}, "shards": [3]}),
        (tmp_path / "set" / "manifest.json").read_text().replace('"samples": 3', '"samples": 4'),
    ):
        (tmp_path / "set" / "manifest.json").write_text(content)
        refused(r"manifest\.json: ")
    with pytest.raises(UserError, match="missing"):
        ShardReader(tmp_path / "gone.tar")


def test_manifest_round_trip_and_hostile_names(tmp_path: Path) -> None:
    manifest = make_set(tmp_path / "set")
    assert Manifest.load(tmp_path / "set") == manifest and manifest.splits == {"train": 6}
    manifest.shards[0].path = "../../etc/passwd"
    manifest.save(tmp_path / "set")
    with pytest.raises(UserError, match="outside"):
        Manifest.load(tmp_path / "set")


def test_what_is_taken_down_is_not_read(tmp_path: Path) -> None:
    manifest = make_set(tmp_path / "set")
    whole = Index.load(tmp_path / "set", "train")
    manifest.removed_keys = [whole.key(1), whole.key(4)]
    manifest.save(tmp_path / "set")
    index = Index.load(tmp_path / "set", "train")
    assert index.keys.tolist() == [key for i, key in enumerate(whole.keys.tolist()) if i not in (1, 4)]
    assert index.removed == [whole.key(1), whole.key(4)]
    assert index.fingerprint() != whole.fingerprint()


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    make_set(tmp_path / "a")
    make_set(tmp_path / "b", per_shard=2)
    a, b = Index.load(tmp_path / "a", "train"), Index.load(tmp_path / "b", "train")
    assert a.fingerprint() == Index.load(tmp_path / "a", "train").fingerprint() != b.fingerprint()
    assert a.crc32c.dtype == np.uint32 and a.media_offset.dtype == np.int64
